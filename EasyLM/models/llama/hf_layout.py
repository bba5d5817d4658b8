"""How a LLaMA of ours and one of Hugging Face's name and lay out the same numbers.

Kernels are `[in, out]` here, `[out, in]` there. Rotary embeddings turn the pairs (2i, 2i+1) of a head here and the
pairs (i, i + K/2) there, so the outputs of the query and key projections are in another order within each head.
Letters: D in, H heads, K head dimension.
"""

import json
import os

import jax
import numpy as np

from EasyLM import checkpoints
from EasyLM.checkpoints import Entry, stacking
from EasyLM.errors import UserError
from EasyLM.models.llama import hf_files, llama_model
from EasyLM.models.llama.llama_config import LLaMAConfig, config_from_dict

_IN_LAYER = {
    "attention/wq/kernel": "self_attn.q_proj",
    "attention/wk/kernel": "self_attn.k_proj",
    "attention/wv/kernel": "self_attn.v_proj",
    "attention/wo/kernel": "self_attn.o_proj",
    "feed_forward/w1/kernel": "mlp.gate_proj",
    "feed_forward/w2/kernel": "mlp.down_proj",
    "feed_forward/w3/kernel": "mlp.up_proj",
    "attention_norm/kernel": "input_layernorm",
    "ffn_norm/kernel": "post_attention_layernorm",
}
_OUTSIDE = {
    "params/transformer/wte/embedding": "model.embed_tokens",
    "params/transformer/ln_f/kernel": "model.norm",
    "params/lm_head/kernel": "lm_head",
}
_ROTARY = ("q_proj.weight", "k_proj.weight")


def hf_name(key: tuple[str, ...]) -> str:
    """The tensor's name there, of a parameter's path in our files."""
    path = "/".join(key)
    if path in _OUTSIDE:
        return f"{_OUTSIDE[path]}.weight"
    _, _, _, layer, rest = path.split("/", 4)
    return f"model.layers.{layer}.{_IN_LAYER[rest]}.weight"


def to_hf(name: str, array: np.ndarray, heads: int) -> np.ndarray:
    """A parameter as Hugging Face lays it out."""
    if array.ndim == 1 or name == "model.embed_tokens.weight":
        return array
    if name.endswith(_ROTARY):
        array_DHK2 = array.reshape(array.shape[0], heads, -1, 2)
        return np.ascontiguousarray(array_DHK2.transpose(1, 3, 2, 0)).reshape(array.shape[::-1])
    return np.ascontiguousarray(array.T)


def from_hf(name: str, array: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `to_hf`, as a view where that is possible."""
    if array.ndim == 1 or name == "model.embed_tokens.weight":
        return array
    if name.endswith(_ROTARY):
        array_H2KD = array.reshape(heads, 2, -1, array.shape[1])
        return array_H2KD.transpose(3, 0, 2, 1).reshape(array.shape[::-1])
    return array.T


def hf_tensors(config: LLaMAConfig, entries: list[Entry], source: str, dtype: np.dtype | None) -> list[Entry]:
    """Our parameters as Hugging Face tensors, none of them read yet, in the order of the layers.

    Raises:
      UserError: if names or shapes are not this model's; `source` names the file.
    """
    found = {entry.key: entry for entry in entries}
    shapes = parameter_shapes(config)
    checkpoints.check_entries(source, found, stacking.stacked_arrays(shapes))
    return [_hf_tensor(config, found[key], dtype) for key, _, _ in stacking.file_order(shapes)]


def _hf_tensor(config: LLaMAConfig, entry: Entry, dtype: np.dtype | None) -> Entry:
    name, heads = hf_name(entry.key), config.num_attention_heads

    def read_into(out):
        np.copyto(out, to_hf(name, entry.read(), heads), casting="unsafe")

    shape = entry.shape if name == "model.embed_tokens.weight" else entry.shape[::-1]
    return Entry((name,), shape, dtype or entry.dtype, read_into)


def read_model(directory: str) -> tuple[LLaMAConfig, list[Entry]]:
    """A Hugging Face model's settings, and its parameters under our names, none of them read yet.

    Raises:
      UserError: if it is no plain LLaMA, or files are missing or broken.
    """
    path = os.path.join(directory, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{directory}: no Hugging Face model: there is no config.json") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    config = config_from_dict(values, path)
    if values.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act={values['hidden_act']!r}: only 'silu' is known here")
    tensors = {tensor.key[0]: tensor for tensor in hf_files.read_weights(directory)}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # some writers store the embedding twice
    names = {hf_name(key): key for key, _, _ in stacking.file_order(parameter_shapes(config))}
    missing, unknown = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
    if missing or unknown:
        raise UserError(f"{directory}: not the tensors of a LLaMA: missing {missing[:4]}, unknown {unknown[:4]}")
    entries = [_entry(config, key, tensors[name]) for name, key in names.items()]
    checkpoints.check_entries(
        directory, {entry.key: entry for entry in entries}, stacking.stacked_arrays(parameter_shapes(config))
    )
    return config, entries


def _entry(config: LLaMAConfig, key: tuple[str, ...], tensor: Entry) -> Entry:
    name, heads = tensor.key[0], config.num_attention_heads

    def read_into(out):
        np.copyto(out, from_hf(name, tensor.read(), heads))

    shape = tensor.shape if name == "model.embed_tokens.weight" else tensor.shape[::-1]
    return Entry(key, shape, tensor.dtype, read_into)


def parameter_shapes(config: LLaMAConfig) -> dict:
    """The tree of the model's parameters, as shapes."""
    return jax.eval_shape(lambda: llama_model.init_params(config, jax.random.key(0)))


# The formats that LLaMA commands accept: those of `EasyLM.checkpoints`, and `huggingface::DIR`.
CHECKPOINT_FORMATS = {**checkpoints.CHECKPOINT_FORMATS, "huggingface": lambda directory: read_model(directory)[1]}


def hf_config(config: LLaMAConfig, dtype: np.dtype) -> dict:
    """The content of `config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "torch_dtype": dtype.name,
        **special_ids(config),
    }


def generation_config(config: LLaMAConfig) -> dict:
    """The content of `generation_config.json`: greedy unless asked; sampling, from all ids (there, from 50)."""
    return {**special_ids(config), "do_sample": False, "top_k": 0}


def special_ids(config: LLaMAConfig) -> dict:
    """bos, eos and pad. Of a vocabulary that lacks them they are null: left out, they would be image codes 1 and 2."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: value if (value := getattr(config, name)) < config.vocab_size else None for name in names}
