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
    """Returns the line of a record with its own field list. Sentences that are no pairs stay whole.

    Raises:
      RecordError: if the line is not a record, or a sentence of pairs does not consist of pairs of images.
    """
    record = parse_line(line)
    ids = decode_tokens(field(record, TOKENS_KEY))
    if record.get("kind") in PAIRS or "mapping" in record:
        others = {key: value for key, value in record.items() if key != TOKENS_KEY}
        return orjson.dumps(others | _divided(ids, record))
    return orjson.dumps(record | {FIELDS_KEY: f"{{{TOKENS_KEY}}}"})


def _divided(ids: np.ndarray, record: Mapping[str, Any]) -> dict[str, Any]:
    size = recorded_tokens_per_image(len(ids), record)
    if not size:
        raise RecordError("has neither sources nor tokens_per_image, which say where its images end")
    if len(ids) % (2 * size):
        raise RecordError(f"{len(ids)} tokens are no pairs of images of {size} tokens")
    images = {f"image_{i}": encode_tokens(part) for i, part in enumerate(einops.rearrange(ids, "(n N) -> n N", N=size))}
    return images | {FIELDS_KEY: ",".join(f"{{{name}}}" if i % 2 else f"[{{{name}}}]" for i, name in enumerate(images))}
