"""EasyLM: training and prompting Large Vision Models in JAX. The README's tree says what each room is for."""

__version__ = "0.2.0"
