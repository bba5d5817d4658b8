"""What is told of a file equals what a plain count finds; bad lines are all counted and listed by address."""

import collections
import gzip
import json

import numpy as np
import pytest
import tokenizer_kit
from PIL import Image

from EasyLM.data import packed_file, records
from EasyLM.errors import UserError
from tokenizer import inspect
from tokenizer.media import charts

EACH = 4  # tokens of a picture here


@pytest.fixture
def sentences(tmp_path):
    """Sentences of random ids, some special, in three files of three forms, with bad lines among them."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(600):
        ids = rng.zipf(1.3, EACH * rng.integers(0, 6) + (number % 50 == 0)) % 100
        ids[:1] = np.where(rng.random(len(ids[:1])) < 0.2, 8192, ids[:1])
        made.append((ids, {"kind": f"kind{number % 3}"} if number % 7 else {}))
    lines = [records.record_line(ids, **others) for ids, others in made]
    (tmp_path / "a.jsonl").write_bytes(b"".join([b"{\n", *lines[:200], b'{"tokens": "?"}\n', b"\n"]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join([*lines[200:400], b"[]\n"])))
    packed_file.write(str(tmp_path / "c.packed"), [(__file__, made[400:])], keep_others=True)
    return made


def figures(tmp_path, names="a.jsonl,b.jsonl.gz,c.packed", **settings) -> dict:
    """What the tool writes."""
    paths = ",".join(str(tmp_path / name) for name in names.split(","))
    output = str(tmp_path / "out" / "f.json")
    settings = {"tokens_per_image": EACH, "codebook_size": 128, "output_json": output, **settings}
    tokenizer_kit.run_main(inspect, input_files=paths, **settings)
    return json.loads((tmp_path / "out" / "f.json").read_text())


@pytest.mark.parametrize("pending", [1, 1 << 20])
def test_figures_are_those_of_a_plain_count(sentences, tmp_path, monkeypatch, pending):
    monkeypatch.setattr(inspect, "_PENDING", pending)
    got = figures(tmp_path)
    ids = np.concatenate([ids for ids, _ in sentences])
    counts = collections.Counter(ids[ids < 128].tolist())
    shares = np.array(list(counts.values())) / sum(counts.values())
    lengths = [len(ids) for ids, _ in sentences]
    assert (got["files"], got["sentences"], got["tokens"]) == (3, 600, len(ids))
    assert (got["shortest"], got["longest"], got["mean_length"]) == (min(lengths), max(lengths), np.mean(lengths))
    assert got["lengths_in_images"] == {
        str(n): count for n, count in sorted(collections.Counter(n // EACH for n in lengths).items())
    }
    assert got["not_whole_images"] == sum(n % EACH != 0 for n in lengths) == 12
    assert got["codes_used"] == len(counts) and got["codes_used_share"] == len(counts) / 128
    assert got["codes_perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert got["special_ids"] == {"8192": int((ids == 8192).sum())}
    assert got["kinds"] == dict(collections.Counter(o.get("kind", "(none)") for _, o in sentences))


def test_bad_lines_are_counted_and_the_first_listed(sentences, tmp_path, capsys):
    got = figures(tmp_path, max_listed=2)
    assert got["bad_lines"] == 3
    first, second = got["first_bad_lines"]
    assert first.startswith(f"{tmp_path}/a.jsonl:1: not JSON") and second.startswith(f"{tmp_path}/a.jsonl:202: field")
    said = capsys.readouterr().out
    assert first in said and "and 1 more bad lines" in said


def test_evenly_used_codes(tmp_path):
    """The perplexity of n codes used alike is n."""
    (tmp_path / "a.jsonl").write_bytes(records.record_line(np.arange(32)) * 3)
    got = figures(tmp_path, "a.jsonl")
    assert got["codes_perplexity"] == pytest.approx(32) and got["codes_used_share"] == 0.25


def test_nothing_but_bad_lines(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"?\n")
    got = figures(tmp_path, "a.jsonl", output_picture=str(tmp_path / "p.png"))
    assert (got["sentences"], got["bad_lines"], got["codes_perplexity"]) == (0, 1, 0.0)


def test_kinds_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "MOST_KINDS", 5)
    (tmp_path / "a.jsonl").write_bytes(b"".join(records.record_line([1], kind=str(n)) for n in range(50)))
    assert figures(tmp_path, "a.jsonl")["kinds"] == {"(others)": 45} | {str(n): 1 for n in range(5)}


def test_picture(sentences, tmp_path):
    figures(tmp_path, output_picture=str(tmp_path / "charts" / "p.png"))
    with Image.open(tmp_path / "charts" / "p.png") as picture:
        assert picture.size == (charts.WIDTH, 3 * charts.HEIGHT)


@pytest.mark.parametrize("largest", [0.3, 1, 7, 10, 99, 12345])
def test_bars_are_as_high_as_their_values(largest):
    values = [largest, largest / 2, 0]
    picture = charts.draw([charts.Panel("t", "x", ["a", "b", "c"], values)])
    plot = picture[charts.TOP : charts.HEIGHT - charts.BOTTOM, charts.LEFT :]
    step = (charts.WIDTH - charts.LEFT - charts.RIGHT) // 3
    first, second, third = ((plot[:, int(step * (i + 0.5))] == charts.BAR).all(axis=1).sum() for i in range(3))
    ticks = charts._ticks(largest)
    assert ticks[-1] >= largest * (1 - 1e-9) and len(ticks) <= 7
    height = charts.HEIGHT - charts.TOP - charts.BOTTOM
    assert abs(first - height * largest / ticks[-1]) <= 2 and abs(second - first / 2) <= 2 and third <= 1


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"tokens_per_image": 0}, "--tokens_per_image=0: must be at least 1"),
        ({"names": "no", "output_picture": "p.txt"}, "--output_picture=p.txt: must end with one of .png, .jpg"),
        ({"names": "no", "output_picture": "/dev/null/p.png"}, "--output_picture=/dev/null/p.png: cannot be written"),
        ({"names": "no", "output_json": "/dev/null/f.json"}, "--output_json=/dev/null/f.json: cannot be written"),
        ({"names": "d.jsonl"}, "d.jsonl: no such file"),
    ],
)
def test_settings(sentences, tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        figures(tmp_path, **settings)
