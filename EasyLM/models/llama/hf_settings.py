"""Translates the `config.json` of a Hugging Face LLaMA to the settings of this project."""

from typing import Any

from EasyLM.errors import UserError
from EasyLM.vocab import CODEBOOK_SIZE, SPECIAL_IDS


def from_hugging_face(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns the values under the names of this project. Keys without a counterpart remain.

    Special ids that are image codes are left out, as in the LVM release.

    Raises:
      UserError: naming `source`, if the model is not a plain LLaMA.
    """
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}  # names in transformers 5 and 4
    if values["model_type"] != "llama" or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{source}: only plain LLaMA is supported, not {values['model_type']!r} with rope {rope}")
    heads = values.get("num_attention_heads")
    if values.get("num_key_value_heads") not in (None, heads):  # null or a missing key means all heads
        raise UserError(f"{source}: num_key_value_heads={values['num_key_value_heads']}: must be {heads}, all heads")
    renamed = {"max_sequence_length": values.get("max_position_embeddings"), "rope_theta": rope.get("rope_theta")}
    values = values | {name: value for name, value in renamed.items() if value is not None}
    codes = values.get("codebook_size")
    least = codes if isinstance(codes, int) and codes > 0 else CODEBOOK_SIZE
    for name in SPECIAL_IDS:
        if not isinstance(values.get(name), int) or values[name] < least:
            values.pop(name, None)
    return values
