"""The names and layouts of LLaMA parameters in EasyLM and in Hugging Face models.

EasyLM kernels have shape [in, out]; Hugging Face kernels have shape [out, in]. Rotary embeddings rotate the pairs
(2i, 2i+1) of a head in EasyLM and the pairs (i, i + K/2) in Hugging Face models. The outputs of the query and key
projections, and the scales of their norms, therefore have a different order within each head.
"""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from einops import rearrange

from EasyLM import checkpoints
from EasyLM.checkpoints import Entry, stacking
from EasyLM.errors import UserError
from EasyLM.models.llama import hf_files, llama_model
from EasyLM.models.llama.llama_config import LLaMAConfig, config_from_dict
from EasyLM.storage import read_json
from EasyLM.vocab import CODEBOOK_SIZE, SPECIAL_IDS

# Name of a parameter in a layer -> name of the tensor below `model.layers.{i}`.
_LAYER_NAMES = {
    "attention/wq/kernel": "self_attn.q_proj",
    "attention/wk/kernel": "self_attn.k_proj",
    "attention/wv/kernel": "self_attn.v_proj",
    "attention/wo/kernel": "self_attn.o_proj",
    "attention/q_norm/kernel": "self_attn.q_norm",
    "attention/k_norm/kernel": "self_attn.k_norm",
    "feed_forward/w1/kernel": "mlp.gate_proj",
    "feed_forward/w2/kernel": "mlp.down_proj",
    "feed_forward/w3/kernel": "mlp.up_proj",
    "attention_norm/kernel": "input_layernorm",
    "ffn_norm/kernel": "post_attention_layernorm",
}
# Name of a parameter outside the layers -> name of the tensor.
_OTHER_NAMES = {
    "params/transformer/wte/embedding": "model.embed_tokens",
    "params/transformer/ln_f/kernel": "model.norm",
    "params/lm_head/kernel": "lm_head",
}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROTARY = tuple(f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "q_norm", "k_norm"))


def hf_name(key: tuple[str, ...]) -> str:
    """Returns the Hugging Face name of a parameter, given its key in a checkpoint."""
    path = "/".join(key)
    if path in _OTHER_NAMES:
        return f"{_OTHER_NAMES[path]}.weight"
    _, _, _, layer, rest = path.split("/", 4)
    return f"model.layers.{layer}.{_LAYER_NAMES[rest]}.weight"


def to_hf(name: str, array: np.ndarray, head_dim: int) -> np.ndarray:
    """Returns a parameter in the layout of the Hugging Face tensor `name`."""
    if name.endswith(_ROTARY):
        array = rearrange(array, "... (H k pair) -> ... (H pair k)", k=head_dim // 2, pair=2)
    return np.ascontiguousarray(array if name == _EMBEDDING else array.T)


def from_hf(name: str, array: np.ndarray, head_dim: int) -> np.ndarray:
    """Inverts `to_hf`. Returns a view where possible."""
    array = array if name == _EMBEDDING else array.T
    if name.endswith(_ROTARY):
        return rearrange(array, "... (H pair k) -> ... (H k pair)", k=head_dim // 2, pair=2)
    return array


def hf_tensors(config: LLaMAConfig, entries: list[Entry], source: str, dtype: np.dtype | None) -> list[Entry]:
    """Returns the entries of a checkpoint as Hugging Face tensors in layer order, without reading them.

    Args:
      source: the checkpoint's name in error messages.
      dtype: the type of the tensors. None keeps the type of each entry.

    Raises:
      UserError: if names or shapes differ from those of the model.
    """
    by_key = {entry.key: entry for entry in entries}
    shapes = parameter_shapes(config)
    checkpoints.check_entries(source, by_key, stacking.stacked_arrays(shapes))
    return [_hf_tensor(config, by_key[key], dtype) for key, _, _ in stacking.file_order(shapes)]


def _hf_tensor(config: LLaMAConfig, entry: Entry, dtype: np.dtype | None) -> Entry:
    name, head_dim = hf_name(entry.key), config.head_dim

    def read_into(out):
        np.copyto(out, to_hf(name, entry.read(), head_dim), casting="unsafe")

    shape = entry.shape if name == _EMBEDDING else entry.shape[::-1]
    return Entry((name,), shape, dtype or entry.dtype, read_into)


def read_model(directory: str) -> tuple[LLaMAConfig, list[Entry]]:
    """Returns the settings of a Hugging Face model, and its parameters as entries that are not read yet.

    Raises:
      UserError: if the model has another architecture, or a file is missing or broken.
    """
    path = os.path.join(directory, "config.json")
    try:
        values = read_json(path)
    except FileNotFoundError:
        reason = "config.json is missing" if os.path.isdir(directory) else "there is no such directory"
        raise UserError(f"{directory}: no Hugging Face model: {reason}") from None
    config = config_from_dict(values, path)
    tensors = {tensor.key[0]: tensor for tensor in hf_files.read_weights(directory)}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and _HEAD in tensors:
        _check_tied(directory, tensors.pop(_HEAD), tensors.get(_EMBEDDING))
    key_of = {hf_name(key): key for key, _, _ in stacking.file_order(parameter_shapes(config))}
    missing, unknown = sorted(set(key_of) - set(tensors)), sorted(set(tensors) - set(key_of))
    if missing or unknown:
        raise UserError(f"{directory}: not the tensors of a LLaMA: missing {missing[:4]}, unknown {unknown[:4]}")
    for name, tensor in tensors.items():
        if not jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating):
            raise UserError(f"{directory}: {name} has the type {tensor.dtype}, not a floating-point type")
    entries = [_entry(config, key, tensors[name]) for name, key in key_of.items()]
    checkpoints.check_entries(
        directory, {entry.key: entry for entry in entries}, stacking.stacked_arrays(parameter_shapes(config))
    )
    return config, entries


def _check_tied(directory: str, head: Entry, embedding: Entry | None) -> None:
    """Checks a head that is stored beside the embedding that it shares, as some programs do.

    Raises:
      UserError: if they differ, so that the setting or the weights are wrong.
    """
    if embedding is not None and not np.array_equal(head.read(), embedding.read()):
        raise UserError(
            f"{directory}: config.json has tie_word_embeddings=true, but {_HEAD} differs from {_EMBEDDING}; set it to "
            "false if the model has a head of its own"
        )


def _entry(config: LLaMAConfig, key: tuple[str, ...], tensor: Entry) -> Entry:
    name, head_dim = tensor.key[0], config.head_dim

    def read_into(out):
        np.copyto(out, from_hf(name, tensor.read(), head_dim))

    shape = tensor.shape if name == _EMBEDDING else tensor.shape[::-1]
    return Entry(key, shape, tensor.dtype, read_into)


def parameter_shapes(config: LLaMAConfig) -> dict:
    """Returns the model's parameters as a tree of `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(lambda: llama_model.init_params(config, jax.random.key(0)))


# The LLaMA commands accept the formats of `EasyLM.checkpoints` and `huggingface::DIR`.
CHECKPOINT_FORMATS = {**checkpoints.CHECKPOINT_FORMATS, "huggingface": lambda directory: read_model(directory)[1]}


def hf_config(config: LLaMAConfig, dtype: np.dtype) -> dict[str, Any]:
    """Returns the content of `config.json`. Qwen3 is the LLaMA with `qk_norm`."""
    scaling = config.rope_scaling
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else dataclasses.asdict(scaling),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "torch_dtype": dtype.name,
        **special_ids(config),
        # Not a setting of transformers, which keeps and ignores it. Programs of this project check the tokenizer by it.
        **({"codebook_size": config.codebook_size} if config.codebook_size else {}),
    }


def generation_config(config: LLaMAConfig) -> dict[str, Any]:
    """Returns the content of `generation_config.json`: sampling from all codes, as the commands of `evaluation` do.

    Without `top_k`, transformers samples from 50 ids; with it, greedy decoding as the default would give a warning. The
    ids after the codes are suppressed, because an image has a fixed number of tokens, and each is a code.
    """
    values = {**special_ids(config), "do_sample": True, "top_k": 0}
    others = list(range(config.codebook_size or CODEBOOK_SIZE, config.vocab_size))
    return values | ({"suppress_tokens": others} if others else {})


def special_ids(config: LLaMAConfig) -> dict[str, int | None]:
    """Returns the ids of bos, eos and pad, or None outside the vocabulary. HF's defaults, 1 and 2, are image codes."""
    ids = {name: getattr(config, name) for name in SPECIAL_IDS}
    return {name: value if value < config.vocab_size else None for name, value in ids.items()}
