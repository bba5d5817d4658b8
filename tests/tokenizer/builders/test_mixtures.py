"""Builds of several data sets: the order of their examples, their shares, shards and resuming, and invalid files."""

import collections
import itertools
from fractions import Fraction

import pytest
import yaml
from build_kit import SETTINGS, Killed, build_records, kill_at_line, report_of
from tokenizer_kit import write_image

from EasyLM import flags
from EasyLM.errors import UserError
from tokenizer import build
from tokenizer.builders import resumable_file, schedule
from tokenizer.builders.mixture_file import read_entries


@pytest.mark.parametrize("counts", [(7,), (5, 5, 5), (1, 40, 0, 13), (100, 3, 17)])
def test_examples_are_spread_evenly_and_any_range_is_a_part_of_the_whole(counts):
    sizes = [max(count // 2 + 1, 1) for count in counts]
    total = sum(counts)
    whole = list(schedule.interleaved(counts, sizes, 3, range(total)))
    times = [(Fraction(2 * k + 1, 2 * n), i) for i, n in enumerate(counts) for k in range(n)]
    assert [slot.data_set for slot in whole] == [i for _, i in sorted(times)]
    assert [slot.number for slot in whole] == list(range(total))
    for i, (count, size) in enumerate(zip(counts, sizes)):
        examples = [slot.example for slot in whole if slot.data_set == i]
        assert count < size or sorted(examples[:size]) == list(range(size))  # an epoch
        assert len(set(examples)) == count  # further epochs have further numbers
        assert count < 20 or examples != sorted(examples)
    for start, stop in itertools.product(range(0, total, 3), (total // 2, total)):
        assert list(schedule.interleaved(counts, sizes, 3, range(start, stop))) == whole[start:stop]


@pytest.fixture
def mixture(tree, tmp_path):
    """Returns a function that writes the file of a mixture of data sets by kind; returns its path."""

    def write(**fields_by_kind) -> str:
        data_sets = []
        for kind, fields in fields_by_kind.items():
            own = {name: value for name, value in SETTINGS[kind].items() if name != "n_epochs"}
            for flag in ("input_dir", "target_dir"):
                if flag in own:
                    own[flag] = str(tree / own[flag])
            data_sets.append({"kind": kind, **own, **fields})
        path = tmp_path / "mix.yaml"
        path.write_text(yaml.safe_dump(data_sets))
        return str(path)

    return write


def _build(path, tiny, output, **settings):
    return build_records("", tiny, output, "images", **{"input_dir": "", "inputs": path, **settings})


def test_weights_are_shares_and_sentences_are_those_of_each_data_set(mixture, tree, tiny, tmp_path, capsys):
    """Of 5 images, 2 sentences of pairs and 2 videos, the videos are used up first."""
    path = mixture(images={"weight": 0.5}, paired={"weight": 0.5}, video={"weight": 1, "strides": 2})
    sentences = _build(path, tiny, tmp_path / "out.jsonl")
    printed = capsys.readouterr().out
    assert f"{path}:4: paired, 1 examples out of 2 (0.50 times)" in printed and "2 examples out of 2" in printed
    expected = {
        kind: [
            (record["sources"], tokens.tolist())
            for tokens, record in build_records(tree, tiny, tmp_path / f"{kind}.jsonl", kind, n_epochs=1, **changes)
        ]
        for kind, changes in {"images": {}, "paired": {}, "video": {"strides": "2"}}.items()
    }
    built = collections.defaultdict(list)
    for tokens, record in sentences:
        built[record["kind"]].append((record["sources"], tokens.tolist()))
    assert len(built["images"]) == len(built["paired"]) == 1
    assert all(sentence in expected[kind] for kind, all_of_kind in built.items() for sentence in all_of_kind)
    assert sorted(built["video"]) == sorted(expected["video"])


def test_without_weights_every_example_occurs_once_an_epoch(mixture, tiny, tmp_path):
    sentences = _build(mixture(images={}, paired={}), tiny, tmp_path / "out.jsonl", n_epochs=3)
    kinds = [record["kind"] for _, record in sentences]
    assert collections.Counter(kinds) == {"images": 15, "paired": 6}
    images = [record["sources"][0] for _, record in sentences if record["kind"] == "images"]
    assert [len(set(images[i : i + 5])) for i in (0, 5, 10)] == [5] * 3 and images[:5] != images[5:10]
    assert kinds[:3] == ["images", "paired", "images"]


def test_shards_and_resumed_builds_of_a_mixture_have_the_same_bytes(mixture, tiny, tmp_path, monkeypatch):
    path = mixture(inpainting={"weight": 2}, paired={"weight": 3}, images={"weight": 5})
    _build(path, tiny, tmp_path / "whole.jsonl", n_epochs=2)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    parts = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for i, part in enumerate(parts):
        _build(path, tiny, part, n_epochs=2, shard=f"{i}/3")
    assert whole and b"".join(part.read_bytes() for part in parts) == whole
    with monkeypatch.context() as patch:
        patch.setattr(resumable_file, "SAVE_SECONDS", 0)
        kill_at_line(patch, 4)
        with pytest.raises(Killed):
            _build(path, tiny, tmp_path / "again.jsonl", n_epochs=2)
    heavier = mixture(inpainting={"weight": 2}, paired={"weight": 3}, images={"weight": 6})
    with pytest.raises(UserError, match="was started with other settings or inputs: inputs="):
        _build(heavier, tiny, tmp_path / "again.jsonl", n_epochs=2)
    mixture(inpainting={"weight": 2}, paired={"weight": 3}, images={"weight": 5})
    _build(path, tiny, tmp_path / "again.jsonl", n_epochs=2)
    assert (tmp_path / "again.jsonl").read_bytes() == whole
    assert report_of(tmp_path / "again.jsonl")["sentences"] == whole.count(b"\n")


def test_values_mean_what_is_typed(tmp_path):
    """YAML 1.1 reads 0123 as 83, 1e3 as a text and `no` as False."""
    path = tmp_path / "mix.yaml"
    path.write_text(
        "- &first {kind: paired, input_dir: 0123, target_dir: no, n_shots: 0123, hole_mask_ratio: 1e-3, weight: 1e3}\n"
        "- {<<: *first, kind: video, strides: 1_0, keys: 2024-01-02, split_at_cuts: true, weight: 007}\n"
    )
    first, second = read_entries(str(path), build.DATA_SET_FLAGS, flags.defaults(build.FLAGS))
    assert first.own == {
        "kind": "paired", "input_dir": "0123", "target_dir": "no", "n_shots": 123, "hole_mask_ratio": 0.001,
    }  # fmt: skip
    assert (first.weight, second.weight) == (1000, 7)
    assert second.own == {
        **first.own, "kind": "video", "strides": "1_0", "keys": "2024-01-02", "split_at_cuts": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "must be a list of data sets, each a mapping such as {kind"),
        ("[", r"not YAML \(while parsing"),
        ("- {kind: images, input_dir: 2024-02-30}", "mix.yaml:1: --input_dir=2024-02-30: no such folder"),
        ("- {kind: images, input_dir: no}", "mix.yaml:1: --input_dir=no: no such folder"),
        ("- {kind: images, input_dir: 1_000}", "mix.yaml:1: --input_dir=1_000: no such folder"),
        ("- {kind: images, input_dir: IN, n_shots: 1:30}", "mix.yaml:1: n_shots=1:30: must be an integer"),
        ("- {kind: images, input_dir: IN, n_shots: 0x10}", "mix.yaml:1: n_shots=0x10: must be an integer"),
        ("- {kind: images, input_dir: IN, n_shots: [1]}", "mix.yaml:1: n_shots=.*1.*: must be an integer"),
        ("- {kind: inpainting, input_dir: IN, hole_mask_ratio: off}", "hole_mask_ratio=off: must be a number"),
        ("- {kind: images, input_dir: IN, weight: 1:30}", "mix.yaml:1: weight=1:30: must be a number above 0"),
        ("- {kind: images, input_dir: IN, weight: yes}", "mix.yaml:1: weight=yes: must be a number above 0"),
        ("- {kind: images, input_dir: IN, weight: }", "mix.yaml:1: weight=: must be a number above 0"),
        ("- {kind: video, input_dir: IN, split_at_cuts: on}", "mix.yaml:1: split_at_cuts=on: must be true or false"),
        ("- images", "mix.yaml:1: must be a mapping"),
        ("- {kind: images, input_dir: IN}\n- {kind: images, input_dri: IN}", "mix.yaml:2: input_dri: .*mean input_dir"),
        ("- {kind: paired, input_dir: IN, keys: jpg,seg.png}", "mix.yaml:1: seg.png: no such field; .*'jpg,seg.png'$"),
        ("- {kind: images, input_dir: IN, seed: 1}", "mix.yaml:1: seed: no such field; choose of kind, input_dir, "),
        ("- {kind: images}", "mix.yaml:1: input_dir: missing"),
        ("- {kind: image, input_dir: IN}", "mix.yaml:1: --kind='image': choose one of 'images', "),
        ("- {kind: images, input_dir: IN, n_shots: 2.5}", "mix.yaml:1: n_shots=2.5: must be an integer"),
        ("- {kind: images, input_dir: IN, n_shots: 0}", "mix.yaml:1: --n_shots=0: must be at least 1"),
        ("- {kind: images, input_dir: IN, weight: 0}", "mix.yaml:1: weight=0: must be a number above 0"),
        ("- {kind: images, input_dir: IN, weight: 1}\n- {kind: images, input_dir: IN}", ":2: has no weight, but"),
        ("- {kind: images, kind: paired, input_dir: IN}", "mix.yaml:1: repeats the field kind"),
        ("- {kind: images, input_dir: nowhere}", "mix.yaml:1: --input_dir=nowhere: no such folder"),
        ("- {kind: paired, input_dir: IN}", "mix.yaml:1: --target_dir is missing"),
        ("- {kind: paired, input_dir: IN, target_dir: IN}", "mix.yaml:1: --n_shots=8: there are only 1 inputs"),
        ("- {kind: video, input_dir: IN, strides: 0}", "mix.yaml:1: --strides=0: each must be at least 1"),
    ],
)  # fmt: skip
def test_invalid_files_are_reported_with_the_line(tiny, tmp_path, text, message):
    write_image(tmp_path / "in" / "a.png", 1)
    (tmp_path / "mix.yaml").write_text(text.replace("IN", str(tmp_path / "in")))
    with pytest.raises(UserError, match=message) as caught:
        _build(str(tmp_path / "mix.yaml"), tiny, tmp_path / "out.jsonl")
    assert "\n" not in str(caught.value)


def test_the_inputs_are_named_once(tiny, tmp_path):
    with pytest.raises(UserError, match=r"mix.yaml: its data sets name their inputs: leave out --input_dir, --keys"):
        _build("mix.yaml", tiny, tmp_path / "out.jsonl", input_dir="x", keys="jpg")
    with pytest.raises(UserError, match=r"--inputs=no.yaml: no such file"):
        _build("no.yaml", tiny, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=rf"--inputs={tmp_path}: cannot be read .Is a directory"):
        _build(str(tmp_path), tiny, tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"--input_dir \(required unless --inputs is given\) is missing"):
        _build("", tiny, tmp_path / "out.jsonl")
