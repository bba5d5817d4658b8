"""Sentences of images: their order, and the codes of each image."""

import pathlib

import numpy as np
import pytest
from build_kit import SETTINGS, assert_codes_of, build_records, load_codec, read_rgb, stem
from tokenizer_kit import run_main

from EasyLM.data import records
from tokenizer import build
from tokenizer.builders.kinds import KINDS
from tokenizer.vqgan import PRETRAINED


def test_every_kind_is_tested():
    assert SETTINGS.keys() == KINDS.keys()


def test_images_are_one_sentence_each_in_name_order(tree, tiny, codec, tmp_path):
    sentences = build_records(tree, tiny, tmp_path / "out.jsonl", "images")
    assert [record["sources"] for _, record in sentences] == [[str(tree / "image" / f"{i}.png")] for i in range(5)]
    for tokens, record in sentences:
        assert_codes_of(codec, tokens, [read_rgb(path) for path in record["sources"]])
        assert record["kind"] == "images" and record.keys() == {"tokens", "tokenizer", "kind", "sources"}
        assert record["tokenizer"] == codec.digest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "paired", "multi_dataset", "category", "frames", "multi_sequence"])
def test_sentences_decode_to_their_images(tree, tmp_path, kind):
    """With the shipped tokenizer, each decoded image is closest to its own source."""
    shipped = load_codec(PRETRAINED, "fp32", 8)
    settings = {"seed": 5, "batch_size": 8, "workers": 1, **SETTINGS[kind]}
    for flag in ("input_dir", "target_dir"):
        settings[flag] = ",".join(str(tree / part) for part in settings.get(flag, "").split(",") if part)
    run_main(build, kind=kind, output_file=str(tmp_path / "out.jsonl"), vqgan=PRETRAINED, **settings)
    sentences = list(records.read_records(str(tmp_path / "out.jsonl"), shipped.config.num_embeddings))
    paths = sorted({path for _, record in sentences for path in record["sources"]})
    references = np.stack([read_rgb(path, shipped.config.resolution) for path in paths]).astype(np.float32) / 255
    for tokens, record in sentences:
        decoded = shipped.decode(tokens.reshape(-1, shipped.config.tokens_per_image))
        distance = np.mean((decoded[:, None] - references[None]) ** 2, axis=(2, 3, 4))
        assert [paths[i] for i in distance.argmin(axis=1)] == record["sources"]


def test_pairs_are_an_image_and_its_label(tree, tiny, codec, tmp_path):
    sentences = build_records(tree, tiny, tmp_path / "out.jsonl", "paired")
    assert len(sentences) == 4  # two epochs of five pairs, two pairs a sentence
    for tokens, record in sentences:
        folders = [pathlib.Path(path).parent.name for path in record["sources"]]
        stems = [stem(path) for path in record["sources"]]
        assert folders == ["image", "label"] * 2 and stems[0::2] == stems[1::2]
        assert_codes_of(codec, tokens, [read_rgb(path) for path in record["sources"]])
    for epoch in (sentences[:2], sentences[2:]):
        used = [path for _, record in epoch for path in record["sources"]]
        assert len(set(used)) == 8
    assert [r["sources"] for _, r in sentences[:2]] != [r["sources"] for _, r in sentences[2:]]


def test_tasks_have_the_same_random_order_in_a_sentence(tree, tiny, codec, tmp_path):
    orders = set()
    for tokens, record in build_records(tree, tiny, tmp_path / "out.jsonl", "multi_dataset"):
        folders = [pathlib.Path(path).parent.name for path in record["sources"]]
        assert sorted(folders[:3]) == ["image", "label", "other"] and folders[3:] == folders[:3]
        assert len({stem(path) for path in record["sources"][:3]}) == 1
        orders.add(tuple(folders[:3]))
        assert_codes_of(codec, tokens, [read_rgb(path) for path in record["sources"]])
    assert len(orders) > 2


def test_categories_are_distinct_classes_of_unused_images(tree, tiny, codec, tmp_path):
    sentences = build_records(tree, tiny, tmp_path / "out.jsonl", "category")
    # The first round has all four classes, the second one the two classes with four images.
    assert len(sentences) == 2 * 3
    for epoch in (sentences[:3], sentences[3:]):
        used = [path for _, record in epoch for path in record["sources"]]
        assert len(set(used)) == len(used) == 12
    for tokens, record in sentences:
        names = [pathlib.Path(path).parent.name for path in record["sources"]]
        assert names[0] == names[1] != names[2] == names[3]
        assert_codes_of(codec, tokens, [read_rgb(path) for path in record["sources"]])
