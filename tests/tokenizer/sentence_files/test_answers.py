"""`tokenizer.mix --answers_only=True`: which tokens are in the loss."""

import gzip
import json

import numpy as np
import pytest
from tokenizer_kit import run_main

from EasyLM.data.record_fields import FieldSettings, make_processor
from EasyLM.data.records import record_line
from EasyLM.errors import UserError
from tokenizer import mix

KINDS = {
    "depth": {"tokens_per_image": 4, "mapping": {"family": "depth"}},  # of tokenizer.mappings
    "inpainting": {"sources": [f"{n}.png" for n in range(6)], "views": ["hole:1", "plain"] * 3},
    "frames": {"tokens_per_image": 4},
    "mine": {},
}


def sentence(kind, images, **others):
    tokens_T = np.random.default_rng(len(kind)).integers(0, 1024, images * 4)
    return record_line(tokens_T, kind=kind, tokenizer="a" * 16, **others), tokens_T


def mixed(tmp_path, *lines, **flags):
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines))
    output = tmp_path / "out.jsonl"
    run_main(mix, inputs=str(tmp_path / "in.jsonl"), output_file=str(output), answers_only=True, **flags)
    return {record["kind"]: record for record in map(json.loads, output.read_text().splitlines())}


def test_only_annotations_and_other_sentences_are_in_the_loss(tmp_path):
    lines, tokens_nT = zip(*(sentence(kind, 6, **others) for kind, others in KINDS.items()), strict=True)
    records = mixed(tmp_path, *lines)
    processor = make_processor(FieldSettings(fields="", fields_from_example="fields"), vocab_size=1024)
    for kind, line, tokens_T in zip(KINDS, lines, tokens_nT, strict=True):
        ids_T, masks_T = processor(records[kind])
        np.testing.assert_array_equal(ids_T, tokens_T)
        image = 0 if kind in ("depth", "inpainting") else 1
        np.testing.assert_array_equal(masks_T, np.tile(np.repeat([image, 1], 4), 3))
        kept = {key: value for key, value in json.loads(line).items() if key != "tokens"}
        assert kept.items() <= records[kind].items()


@pytest.mark.parametrize(
    "images, others, message",
    [
        (6, {}, "has neither sources nor tokens_per_image, so that the size of its images is not known"),
        (5, {"tokens_per_image": 4}, "20 tokens do not divide into pairs of images of 4 tokens"),
        (6, {"tokens_per_image": 5}, "24 tokens do not divide into pairs of images of 5 tokens"),
        (6, {"sources": ["a.png"] * 3}, "24 tokens do not divide into pairs of images of 8 tokens"),
        (0, {"tokens_per_image": 4}, "0 tokens do not divide into pairs of images of 4 tokens"),
        (6, {"tokens_per_image": 4, "fields": "{mine}"}, "already has the field 'fields'"),
        (6, {"tokens_per_image": 4, "image_3": ""}, "already has the field 'image_3'"),
    ],
)
def test_sentences_that_cannot_be_divided_are_bad_lines(tmp_path, images, others, message):
    lines = [sentence("frames", 3)[0], sentence("paired", images, **others)[0]]
    with pytest.raises(UserError, match=rf"{tmp_path}/in.jsonl:2: {message}"):
        mixed(tmp_path, *lines)
    assert not (tmp_path / "out.jsonl").exists()
    assert list(mixed(tmp_path, *lines, max_errors=1)) == ["frames"]


def test_a_record_that_cannot_be_written_is_a_bad_line(tmp_path):
    line, _ = sentence("mine", 2)
    deep = line[:-2] + b',"deep":' + b"[" * 300 + b"]" * 300 + b"}\n"
    with pytest.raises(UserError, match=rf"{tmp_path}/in.jsonl:1: "):
        mixed(tmp_path, deep)


@pytest.mark.parametrize("flags", [{}, {"memory_mb": 1, "counts": "9000"}])
def test_compressed_and_repeated_sentences(tmp_path, flags):
    """Also where the lines do not fit into memory."""
    lines = [sentence("depth", 6, **KINDS["depth"], number=number)[0] for number in range(3)]
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    output = tmp_path / "out.jsonl"
    run_main(mix, inputs=str(tmp_path / "in.jsonl.gz"), output_file=str(output), answers_only=True, **flags)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == int(flags.get("counts", 3)) and {record["number"] for record in records} == {0, 1, 2}
    assert all(record["fields"].startswith("[{image_0}],{image_1},") for record in records)
