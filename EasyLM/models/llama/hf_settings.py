"""The settings of a LLaMA in a Hugging Face `config.json`."""

from collections.abc import Mapping
from typing import Any

from EasyLM.errors import UserError, prefix_errors
from EasyLM.models.llama.rope_scaling import as_rope_scaling
from EasyLM.storage import check_schema
from EasyLM.vocab import CODEBOOK_SIZE, SPECIAL_IDS

# Name here -> name in config.json. `rope_theta`, the rope scaling and `qk_norm` have no name of their own there.
_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "max_sequence_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
    "codebook_size": "codebook_size",
}
_NULLABLE = ("num_key_value_heads", "max_position_embeddings", "rope_theta")  # null means the default
_MODEL_TYPES = {"llama": False, "qwen3": True}  # -> qk_norm
# Fields of config.json that can describe another architecture, and their values for a LLaMA. Null is always valid.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": ({},),
}


def from_hugging_face(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns the settings in a Hugging Face config of a model that is a LLaMA: `llama`, or `qwen3`.

    Special ids that are image codes are left out, as in the LVM release.

    Args:
      values: the content of a `config.json`.
      source: the name of the values in error messages.

    Raises:
      UserError: naming all fields of another architecture, with their values.
    """
    with prefix_errors(source):
        ropes = {f"{name}?": (dict, type(None)) for name in ("rope_parameters", "rope_scaling")}
        check_schema(values, {"model_type": str, **ropes})
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}  # names in transformers 5 and 4
    if differences := _differences(values, rope):
        raise UserError(
            f"{source}: only the architectures of LLaMA and Qwen3 (dense, full attention, no biases, not quantized) "
            f"are supported, not {', '.join(differences)}"
        )
    with prefix_errors(f"{source}: rope_scaling={dict(rope)}"):
        length = values.get("max_position_embeddings")
        scaling = as_rope_scaling({"original_max_position_embeddings": length} | rope if length else rope)
    given = dict(values) | ({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})
    given = {name: value for name, value in given.items() if value is not None or name not in _NULLABLE}
    settings = {name: given[theirs] for name, theirs in _NAMES.items() if theirs in given}
    codes = values.get("codebook_size")
    least = codes if isinstance(codes, int) and codes > 0 else CODEBOOK_SIZE
    for name in SPECIAL_IDS:
        if isinstance(values.get(name), int) and values[name] >= least:  # in the LVM release these are image codes
            settings[name] = values[name]
    return settings | {"rope_scaling": scaling, "qk_norm": _MODEL_TYPES[values["model_type"]]}


def check_head_dim(values: Mapping[str, Any], head_dim: int, source: str) -> None:
    """Checks that the heads have the width `hidden_size / num_attention_heads` if the config states their width.

    Raises:
      UserError: if they have another width.
    """
    stated = values.get("head_dim", 128 if values.get("model_type") == "qwen3" else None)  # 128 is the default of Qwen3
    if stated not in (None, head_dim):
        raise UserError(
            f"{source}: head_dim={stated!r}: only {head_dim} is supported, hidden_size / num_attention_heads"
        )


def _differences(values: Mapping[str, Any], rope: Mapping[str, Any]) -> list[str]:
    """Returns the fields, as `name=value`, for which the model is not a LLaMA."""
    kind, differences = values["model_type"], []

    def require(name: str, value: Any, valid: bool) -> None:
        if not valid:
            differences.append(f"{name}={value!r}")

    require("model_type", kind, kind in _MODEL_TYPES)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    require("rope_type", rope_type, rope_type in ("default", "llama3"))
    for name, valid in _UNSUPPORTED.items():
        value = rope.get(name, values.get(name))
        require(name, value, value is None or value in valid)
    if kind != "qwen3":  # whose window needs use_sliding_window
        require("sliding_window", values.get("sliding_window"), values.get("sliding_window") is None)
    layers = values.get("layer_types") or []
    require("layer_types", layers, isinstance(layers, list) and set(map(str, layers)) <= {"full_attention"})
    return differences
