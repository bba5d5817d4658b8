"""The LLaMA (arXiv 2302.13971): settings, model, decoding, training, export and import.

May import every room of EasyLM. Imports nothing here: `--help` of a command must not import JAX. Other rooms import its
modules, which are namespaces: `from EasyLM.models.llama import llama_config`. The letters of shapes are those of
`EasyLM.models`; k counts the pairs of a head's dimension.

Vocabulary:
  kernel: the matrix of a linear layer, or the scale of a norm.
  preset: a named size, `vqlm_100m` to `vqlm_30b`.
  stacked: with all layers along a leading axis.
  rope: the cosines and sines of the rotary position embedding.

Modules:
  llama_config: settings, flags, presets.
  partition_rules, remat_policies, costs: sharding, rematerialisation and costs of the layers.
  layers, rotary: the parts of the model.
  llama_model: the model and its loss.
  llama_decode: decoding with a cache, likelihoods.
  hf_files, hf_layout: weight files and tensor layout of Hugging Face.
  llama_train, llama_serve, convert_easylm_to_hf, convert_hf_to_easylm: commands.
"""
