"""EasyLM: training and prompting Large Vision Models in JAX. The README's tree says what each module is for."""
