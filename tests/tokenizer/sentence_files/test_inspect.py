"""Statistics equal a plain count. Bad lines are counted and listed by address. Charts show the counts."""

import collections
import gzip
import json
import os
import sys

import numpy as np
import pytest
import tokenizer_kit
from data_kit import base64_line
from PIL import Image

from EasyLM.data import packed_file, records
from EasyLM.errors import UserError
from tokenizer import inspect
from tokenizer.sentence_files import summary

TOKENS_PER_IMAGE = 4


@pytest.fixture
def sentences(tmp_path):
    """Sentences of random and special ids in three files of different formats, with bad lines."""
    rng = np.random.default_rng(0)
    sentences = []
    for number in range(600):
        ids = rng.zipf(1.3, TOKENS_PER_IMAGE * rng.integers(0, 6) + (number % 50 == 0)) % 100
        ids[:1] = np.where(rng.random(len(ids[:1])) < 0.2, 8192, ids[:1])
        sentences.append((ids, {"kind": f"kind{number % 3}"} if number % 7 else {}))
    lines = [records.record_line(ids, **others) for ids, others in sentences]
    (tmp_path / "a.jsonl").write_bytes(b"".join([b"{\n", *lines[:200], b'{"tokens": "?"}\n', b"\n"]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join([*lines[200:400], b"[]\n"])))
    packed_file.write(str(tmp_path / "c.packed"), [(__file__, sentences[400:])], keep_others=True)
    return sentences


def statistics(tmp_path, names="a.jsonl,b.jsonl.gz,c.packed", **settings) -> dict:
    """Runs the command; returns the JSON that it writes."""
    paths = ",".join(str(tmp_path / name) for name in names.split(","))
    output = str(tmp_path / "out" / "f.json")
    settings = {"tokens_per_image": TOKENS_PER_IMAGE, "codebook_size": 128, "output_json": output, **settings}
    tokenizer_kit.run_main(inspect, input_files=paths, **settings)
    return json.loads((tmp_path / "out" / "f.json").read_text())


@pytest.mark.parametrize("batched_ids", [1, 1 << 20])
def test_statistics_equal_a_plain_count(sentences, tmp_path, monkeypatch, batched_ids):
    monkeypatch.setattr(summary, "_BATCHED_IDS", batched_ids)
    values = statistics(tmp_path)
    ids = np.concatenate([ids for ids, _ in sentences])
    counts = collections.Counter(ids[ids < 128].tolist())
    shares = np.array(list(counts.values())) / sum(counts.values())
    lengths = [len(ids) for ids, _ in sentences]
    assert (values["files"], values["sentences"], values["tokens"]) == (3, 600, len(ids))
    assert (values["shortest"], values["longest"], values["mean_length"]) == (
        min(lengths),
        max(lengths),
        np.mean(lengths),
    )
    assert values["lengths_in_images"] == {
        str(n): count for n, count in sorted(collections.Counter(n // TOKENS_PER_IMAGE for n in lengths).items())
    }
    assert values["not_whole_images"] == sum(n % TOKENS_PER_IMAGE != 0 for n in lengths) == 12
    assert values["codes_used"] == len(counts) and values["codes_used_share"] == len(counts) / 128
    assert values["codes_perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert values["special_ids"] == {"8192": int((ids == 8192).sum())}
    assert values["kinds"] == dict(collections.Counter(others.get("kind", "(none)") for _, others in sentences))


def test_bad_lines_are_counted_and_the_first_listed(sentences, tmp_path, capsys):
    values = statistics(tmp_path, max_listed=2)
    assert values["bad_lines"] == 3
    first, second = values["first_bad_lines"]
    assert first.startswith(f"{tmp_path}/a.jsonl:1: not JSON") and second.startswith(f"{tmp_path}/a.jsonl:202: field")
    output = capsys.readouterr().out
    assert first in output and "and 1 more bad lines" in output


def test_perplexity_of_evenly_used_codes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(records.record_line(np.arange(32)) * 3)
    values = statistics(tmp_path, "a.jsonl")
    assert values["codes_perplexity"] == pytest.approx(32) and values["codes_used_share"] == 0.25


def test_a_file_of_bad_lines_only(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"?\n")
    values = statistics(tmp_path, "a.jsonl", output_picture=str(tmp_path / "p.png"))
    assert (values["sentences"], values["bad_lines"], values["codes_perplexity"]) == (0, 1, 0.0)


def test_the_number_of_kinds_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "MAX_KINDS", 5)
    (tmp_path / "a.jsonl").write_bytes(b"".join(records.record_line([1], kind=str(n)) for n in range(50)))
    assert statistics(tmp_path, "a.jsonl")["kinds"] == {"(others)": 45} | {str(n): 1 for n in range(5)}


def test_charts_show_lengths_codes_and_kinds():
    """The heights of bars and points in the three panels are the counts."""
    counts = summary.Summary(vocab_size=12, codebook_size=10, tokens_per_image=TOKENS_PER_IMAGE)
    for kind, ids in (("paired", [0, 1, 1, 2] * 2), ("frames", [1, 1, 1, 3]), ("frames", [11, 1, 0, 2])):
        counts.add(np.array(ids), {"kind": kind})
    lengths, codes, kinds = summary.plot(counts.statistics(), counts.code_counts()).axes
    for axes, names, heights in ((lengths, ["1", "2"], [2, 1]), (kinds, ["frames", "paired"], [2, 1])):
        assert [bar.get_height() for bar in axes.patches] == heights
        assert [label.get_text() for label in axes.get_xticklabels()] == names
        assert all(tick == round(tick) for tick in axes.get_yticks())
    (curve,) = codes.lines
    assert curve.get_ydata().tolist() == [8, 3, 3, 1] and codes.get_yscale() == "log"
    assert "4 of 10 codes used" in codes.get_title(loc="left")


def test_charts_of_many_lengths_have_few_labels():
    counts = summary.Summary(vocab_size=12, codebook_size=10, tokens_per_image=1)
    for length in range(100):
        counts.add(np.zeros(length, np.int64), {})
    lengths, _, _ = summary.plot(counts.statistics(), counts.code_counts()).axes
    assert len(lengths.patches) == 100 and len(lengths.get_xticklabels()) <= 12


def test_charts_are_written_as_an_image(sentences, tmp_path):
    statistics(tmp_path, output_picture=str(tmp_path / "charts" / "p.png"))
    with Image.open(tmp_path / "charts" / "p.png") as image:
        assert image.format == "PNG" and min(image.size) > 500
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert (0x42, 0x72, 0xAE) in colours
    assert os.listdir(tmp_path / "charts") == ["p.png"]


def test_missing_matplotlib_is_reported_before_the_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"--output_picture needs the package matplotlib: pip install .*quickstart"):
        statistics(tmp_path, "none.jsonl", output_picture=str(tmp_path / "p.png"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tokens_per_image": 0}, "--tokens_per_image=0: must be at least 1"),
        ({"names": "no", "output_picture": "p.txt"}, "--output_picture=p.txt: must end with one of .png, .jpg"),
        ({"names": "no", "output_picture": "/dev/null/p.png"}, "--output_picture=/dev/null/p.png: cannot be written"),
        ({"output_json": "/dev/null/f.json"}, "--output_json=/dev/null/f.json: cannot be written"),
        ({"names": "d.jsonl"}, "d.jsonl: no such file"),
    ],
)
def test_invalid_settings(sentences, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        statistics(tmp_path, **settings)


def test_ids_of_64_bits_are_reported(tmp_path, capsys):
    ids = np.random.default_rng(0).integers(0, 128, (3, 2 * TOKENS_PER_IMAGE))
    wide, narrow = (b"".join(records.record_line(row) for row in rows) for rows in (ids.view("<i4"), ids))
    (tmp_path / "a.jsonl").write_bytes(wide + narrow)
    assert statistics(tmp_path, "a.jsonl")["alternate_zeros"] == 3
    assert "every second id is 0 in 3 sentences" in capsys.readouterr().out


@pytest.mark.parametrize(("stored", "name"), [("<u2", "u2"), (">i4", "big-endian i4")])
def test_lines_with_ids_of_another_type_are_bad_and_name_it(tmp_path, capsys, stored, name):
    ids = np.arange(2 * TOKENS_PER_IMAGE).astype(stored)
    (tmp_path / "a.jsonl").write_text(base64_line(ids, dtype=stored) + "\n")
    assert statistics(tmp_path, "a.jsonl")["bad_lines"] == 1
    assert f"are they stored as {name}, not as i4?" in capsys.readouterr().out


@pytest.mark.parametrize("tokens", [1, 2, 64, 512])
def test_the_records_say_how_many_tokens_an_image_has(tmp_path, tokens, capsys):
    """By their sources, or in so many words. A clip of one source and a sentence without whole images are outvoted."""
    lines = [records.record_line([1] * tokens * 4, sources=list("abcd")) for _ in range(2)]
    lines += [records.record_line([1] * tokens * 3, tokens_per_image=tokens) for _ in range(2)]
    lines += [records.record_line([1] * tokens * 3 + [2], sources=list("abc")), records.record_line([1] * tokens * 8)]
    lines += [records.record_line([1] * tokens * 4, sources=["clip.mp4"], tokens_per_image="many")]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    values = statistics(tmp_path, "a.jsonl", tokens_per_image=None)
    assert values["tokens_per_image"] == tokens
    expected = {"3": 3, "4": 3, "8": 1} if tokens > 1 else {"3": 2, "4": 4, "8": 1}
    assert values["lengths_in_images"] == expected and values["not_whole_images"] == (tokens > 1)
    assert f"tokens per image     {tokens}\n" in capsys.readouterr().out
    assert statistics(tmp_path, "a.jsonl", tokens_per_image=3 * tokens)["lengths_in_images"]["1"] == 6


def test_records_without_sources_state_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(records.record_line([1] * 48, tokens_per_image=16))
    assert statistics(tmp_path, "a.jsonl", tokens_per_image=None)["lengths_in_images"] == {"3": 1}


def test_without_a_hint_an_image_has_256_tokens(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(records.record_line([1] * 512))
    values = statistics(tmp_path, "a.jsonl", tokens_per_image=None)
    assert (values["tokens_per_image"], values["lengths_in_images"]) == (256, {"2": 1})


def test_tokenizers_are_counted(tmp_path, capsys):
    names = [{"tokenizer": "aa"}] * 2 + [{}] + [{"tokenizer": "bb"}] * 3
    (tmp_path / "a.jsonl").write_bytes(b"".join(records.record_line([1] * 4, **others) for others in names))
    assert statistics(tmp_path, "a.jsonl")["tokenizers"] == {"bb": 3, "aa": 2, "(none)": 1}
    assert "tokenizers           bb, aa, (none)" in capsys.readouterr().out
