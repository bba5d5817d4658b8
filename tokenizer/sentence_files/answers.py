"""Sentences of which only the annotations are in the loss.

Each image becomes a field of its record, and the record's own field list excludes the images from the loss.
"""

from collections.abc import Mapping
from typing import Any

import einops
import numpy as np
import orjson

from EasyLM.data.records import TOKENS_KEY, RecordError, decode_tokens, encode_tokens, field, parse_line
from tokenizer.sentence_files.summary import recorded_tokens_per_image

# Kinds of sentences [image, annotation, image, annotation, ...]. Those of `tokenizer.mappings` have a mapping instead.
PAIRS = ("paired", "map_color", "colorization", "inpainting")
FIELDS_KEY = "fields"


def answers_line(line: bytes) -> bytes:
    """Returns the line of a record with its own field list. Sentences that are not pairs stay whole.

    Raises:
      RecordError: if the line is not a record, or a sentence of pairs does not consist of pairs of images.
    """
    record = parse_line(line)
    ids = decode_tokens(field(record, TOKENS_KEY))
    fields = {TOKENS_KEY: record.pop(TOKENS_KEY), FIELDS_KEY: f"{{{TOKENS_KEY}}}"}
    if record.get("kind") in PAIRS or isinstance(record.get("mapping"), Mapping):
        fields = _divided(ids, record)
    if taken := fields.keys() & record.keys():
        raise RecordError(f"already has the field {min(taken)!r}")
    try:
        return orjson.dumps(record | fields)
    except orjson.JSONEncodeError as error:  # such as too many levels
        raise RecordError(f"cannot be written: {error}") from None


def _divided(ids: np.ndarray, record: Mapping[str, Any]) -> dict[str, Any]:
    size = recorded_tokens_per_image(len(ids), record)
    if not size:
        raise RecordError("has neither sources nor tokens_per_image, so that the size of its images is not known")
    if not len(ids) or len(ids) % (2 * size):
        raise RecordError(f"{len(ids)} tokens do not divide into pairs of images of {size} tokens")
    images = {f"image_{i}": encode_tokens(part) for i, part in enumerate(einops.rearrange(ids, "(n N) -> n N", N=size))}
    return images | {FIELDS_KEY: ",".join(f"{{{name}}}" if i % 2 else f"[{{{name}}}]" for i, name in enumerate(images))}
