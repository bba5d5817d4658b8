"""The LLaMA model (arXiv 2302.13971): settings, layers, decoding, training, export and import.

May import every sub-package of EasyLM. Import the modules: `from EasyLM.models.llama import llama_config`. This file
imports nothing. `EasyLM.models` defines the letters of shapes. In addition, k indexes the pairs of a head's dimension,
and I, O and R are the inputs and outputs of a linear layer and the rank of its adapter.

Vocabulary:
  kernel: the matrix of a linear layer, or the scale of a norm.
  preset: the settings of a named model size, `vqlm_100m` to `vqlm_30b`.
  stacked: with all layers along the leading axis.
  adapter: two matrices whose low-rank product is added to a frozen kernel (LoRA).
  rope: the cosines and sines of the rotary position embedding.

Modules:
  llama_config: settings, flags, presets. setting_fields, dict_literal: their fields, and their values in flags.
  checkpoint_record: the file in which a checkpoint records its model and its image tokenizer.
  partition_rules, remat_policies, costs: sharding, rematerialization and FLOPs.
  gathered_matmul: products with kernels that large TPU slices gather in two steps.
  memory: the bytes of a train step by formula, and the rematerialization that fits.
  layers, rotary, rope_scaling: the parts of the model.
  llama_model: the model and its loss.
  inference_model, int8_kernels: the model with separate layers, for generation and scoring; kernels in int8.
  llama_decode: decoding with a key-value cache; likelihoods.
  inference_memory: the memory of generation and scoring, from shapes.
  hf_settings, hf_files, hf_layout: settings, weight files and tensor layout of Hugging Face models.
  exported_card: the model card of an exported model.
  lora, adapters, lora_checkpoint: low-rank adapters: settings, training, checkpoints.
  training_task: what `llama_train` trains, from its flags.
  llama_train, llama_plan, llama_serve, convert_easylm_to_hf, convert_hf_to_easylm, convert_checkpoint: commands.
"""
