"""The command drops each image for its reason, from every source; parts, interruptions and workers change nothing."""

import concurrent.futures
import json
import os
import shutil
from collections import Counter
from concurrent.futures.process import BrokenProcessPool

import pytest
from build_kit import Killed
from filter_kit import REASONS, SETTINGS, encoded, kept_names, photo, pictures, run_filter, sidecars, write_blocklist
from PIL import Image
from source_kit import tar_bytes, write_parquet, write_remote
from tokenizer_kit import run_main

from EasyLM.errors import UserError
from EasyLM.storage import HeartbeatLock, LockedError, read_lines
from tokenizer.builders import resumable_file
from tokenizer.filter import __main__ as command
from tokenizer.filter import measurements, measuring
from tokenizer.filter.listing import Entry
from tokenizer.sources import detection, keep_list
from tokenizer.sources.container_files import names_of

FILES = pictures()
KEPT = [name for name in FILES if name not in REASONS]


def _folder(directory):
    for name, data in {**FILES, **sidecars(FILES)}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return str(directory)


def _tars(directory):
    directory.mkdir()
    names = list(FILES)
    for number, part in enumerate((names[:4], names[4:])):
        members = {name: FILES[name] for name in part}
        (directory / f"{number}.tar").write_bytes(tar_bytes({**members, **sidecars(members)}))
    return f"{directory}/{{0..1}}.tar"


def _table(directory):
    cells = [{"bytes": data, "path": name} for name, data in FILES.items()]
    scores = [4.5 if "ugly" in name else 6.0 for name in FILES]
    write_parquet(directory / "a.parquet", {"image": cells, "aesthetic": scores}, 3)
    return str(directory)


def _remote(directory):
    return write_remote(f"memory:/{directory}", {**FILES, **sidecars(FILES)})


def _file_name(name: str) -> str:
    """Returns the name in FILES of a name in a list."""
    container, _, member = name.rpartition("!")
    return list(FILES)[int(member.partition(".")[0])] if container.endswith(".parquet") else member


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A folder of FILES with their scores. Tests must not change it."""
    return _folder(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("source", [_folder, _tars, _table, _remote])
def test_each_image_is_dropped_for_its_reason_from_every_source(tmp_path, capsys, source):
    input_dir = source(tmp_path / "in")
    blocklist = write_blocklist(tmp_path / "blocklist.txt", FILES)
    report = run_filter(tmp_path / "keep.jsonl.gz", input_dir=input_dir, blocklist=blocklist)
    assert [_file_name(name) for name in kept_names(tmp_path / "keep.jsonl.gz")] == KEPT
    examples = [(reason, example) for reason, of_reason in report["examples"].items() for example in of_reason]
    assert {_file_name(example["name"]): reason for reason, example in examples} == REASONS
    assert report["images"] == len(FILES) and report["counts"]["kept"] == len(KEPT)
    assert sum(report["counts"].values()) == len(FILES) and report["counts"]["--blocklist"] == 2
    pairs = {(e["name"], e["duplicate_of"]) for _, e in examples if "duplicate_of" in e}
    assert {tuple(map(_file_name, pair)) for pair in pairs} == {
        ("twin/0.png", "good/0.png"),
        ("good/1.png", "large/1.jpg"),
    }
    printed, messages = capsys.readouterr()
    assert "ignored files" not in messages  # the scores are used
    names = printed.replace("a.parquet!8.image", "twin/0.png")
    assert "--near_duplicates=2" in printed and "twin/0.png, a duplicate of" in names


def test_without_rules_exact_copies_and_uniform_images_are_dropped(folder, tmp_path):
    run_main(command, input_dir=folder, output_file=str(tmp_path / "keep.jsonl"), workers=1)
    assert kept_names(tmp_path / "keep.jsonl") == [name for name in FILES if name not in ("flat.png", "twin/0.png")]


def test_other_rules_read_no_image_again(folder, tmp_path, monkeypatch):
    settings = {"input_dir": folder, "max": "aesthetic:9"}
    run_filter(tmp_path / "keep.jsonl", **settings)
    monkeypatch.setattr(measuring, "measure", None)
    report = run_filter(tmp_path / "keep.jsonl", **{**settings, "min_side": 100, "near_duplicates": -1, "max": ""})
    assert kept_names(tmp_path / "keep.jsonl") == ["large/1.jpg"] and "--min_side=100" in report["counts"]
    measured = f"{tmp_path}/keep.jsonl.measurements.jsonl.zst"
    run_filter(tmp_path / "again.jsonl", measurements=measured, min_side=100, near_duplicates=-1)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "keep.jsonl").read_bytes()
    with pytest.raises(UserError, match="need beauty; the measured scores are aesthetic"):
        run_filter(tmp_path / "again.jsonl", measurements=measured, min="beauty:1")


@pytest.mark.parametrize("source", [_folder, _tars])
@pytest.mark.parametrize("parts", [2, 12])
def test_the_parts_of_a_sharded_run_give_the_list_of_a_whole_one(tmp_path, source, parts):
    """There are more parts than images or tars: some are empty. Near duplicates are in different parts."""
    input_dir = source(tmp_path / "in")
    run_filter(tmp_path / "whole.jsonl", input_dir=input_dir)
    pattern = f"{tmp_path}/parts/{{i}}.jsonl.zst"
    for part in range(parts):
        settings = {**SETTINGS, "input_dir": input_dir, "measurements": pattern, "shard": f"{part}/{parts}"}
        run_main(command, **settings)
    run_filter(tmp_path / "merged.jsonl", measurements=f"{tmp_path}/parts/*.zst")
    assert (tmp_path / "merged.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    first, second, *_ = sorted(str(path) for path in (tmp_path / "parts").glob("*.zst"))
    for suffix in ("", ".report.json"):
        shutil.copy(f"{first}{suffix}", f"{tmp_path}/copy.zst{suffix}")
    for others, message in {
        f"{tmp_path}/copy.zst": r"copy\.zst: is part 0 of a source, and so is",
        f"{tmp_path}/whole.jsonl.measurements.jsonl.zst": "are not parts of one source",
    }.items():
        with pytest.raises(UserError, match=message):
            run_filter(tmp_path / "merged.jsonl", measurements=f"{first},{others}")
    with pytest.raises(UserError, match=rf"{second}: is one of {parts} parts of a source, of which .*missing: 0"):
        run_filter(tmp_path / "merged.jsonl", measurements=f"{second},{tmp_path}/parts/*[1-9].jsonl.zst")


def test_a_process_lists_only_the_tars_of_its_part(tmp_path):
    """A tar without an image does not keep the other parts from being complete."""
    input_dir = _tars(tmp_path / "in")
    (tmp_path / "in" / "1.tar").write_bytes(b"text")
    settings = {**SETTINGS, "input_dir": input_dir, "measurements": f"{tmp_path}/{{i}}.zst"}
    run_main(command, **settings, shard="0/2")
    with pytest.raises(UserError, match=r"1\.tar: not a whole tar"):
        run_main(command, **settings, shard="1/2")
    run_main(command, **settings, shard="1/2", max_errors=1)
    report = run_filter(tmp_path / "keep.jsonl", measurements=f"{tmp_path}/?.zst")
    assert report["images"] == 4 and "1.tar" in report["skipped"][0]["input"]


def test_an_interrupted_run_resumes_and_measures_no_image_twice(folder, tmp_path, monkeypatch):
    run_filter(tmp_path / "whole.jsonl", input_dir=folder)
    monkeypatch.setattr(measurements, "_GROUP", 2)
    monkeypatch.setattr(resumable_file, "SAVE_SECONDS", 0)
    seen, measure, save = [], measuring.measure, resumable_file.ResumableFile.save

    def kill_at_second_save(self, state):
        save(self, state)
        if state["number"] == 4:
            raise Killed

    monkeypatch.setattr(measuring, "measure", lambda entries, scores: seen.extend(entries) or measure(entries, scores))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(resumable_file.ResumableFile, "save", kill_at_second_save)
        run_filter(tmp_path / "again.jsonl", input_dir=folder)
    assert not (tmp_path / "again.jsonl").exists()
    seen.clear()
    run_filter(tmp_path / "again.jsonl", input_dir=folder)
    assert [entry.name for entry in seen] == list(FILES)[4:]
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    lines = [list(read_lines(f"{tmp_path}/{name}.jsonl.measurements.jsonl.zst")) for name in ("whole", "again")]
    assert lines[0] == lines[1] and len(lines[0]) == len(FILES)


@pytest.mark.parametrize("killed_at", range(3))
def test_after_a_kill_a_list_has_its_own_report(folder, tmp_path, monkeypatch, killed_at):
    """The second run replaces the list and the report of the first one."""
    path, report = tmp_path / "keep.jsonl", tmp_path / "keep.jsonl.report.json"
    whole = []
    for min_side in (0, 100):
        run_filter(path, input_dir=folder, min_side=min_side)
        whole.append((path.read_bytes(), report.read_bytes()))
    run_filter(path, input_dir=folder, min_side=0)
    calls = []

    def until_the_kill(change):
        def changed(*arguments):
            if str(arguments[-1]).startswith(str(path)) and not str(arguments[-1]).endswith(".lock"):
                calls.append(arguments[-1])
                if len(calls) == killed_at + 1:
                    raise Killed
            change(*arguments)

        return changed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        for name in ("replace", "remove"):
            patch.setattr(os, name, until_the_kill(getattr(os, name)))
        run_filter(path, input_dir=folder, min_side=100)
    assert not path.exists() or (path.read_bytes(), report.read_bytes()) in whole
    run_filter(path, input_dir=folder, min_side=100)
    assert (path.read_bytes(), report.read_bytes()) == whole[1] != whole[0]


def test_measurements_that_another_process_writes_are_not_measured_twice(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "measure", None)
    with (
        HeartbeatLock(f"{tmp_path}/keep.jsonl.measurements.jsonl.zst", is_output=True),
        pytest.raises(LockedError, match=r"measurements\.jsonl\.zst: in use by process"),
    ):
        run_filter(tmp_path / "keep.jsonl", input_dir=folder)


def test_unreadable_images_are_skipped_within_max_errors(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"text")
    with pytest.raises(UserError, match=r"b\.png: not a readable image .*--max_errors=0"):
        run_filter(tmp_path / "keep.jsonl", input_dir=str(tmp_path), min="")
    settings = {"input_dir": str(tmp_path), "min": "", "min_side": 0, "min_contrast": 0, "max_errors": 1}
    report = run_filter(tmp_path / "keep.jsonl", **settings)
    assert kept_names(tmp_path / "keep.jsonl") == ["a.png"]
    assert (report["images"], report["unreadable"]) == (2, 1) and "b.png" in report["skipped"][0]["reason"]


def test_an_image_that_kills_its_process_is_named_and_the_others_are_measured(tmp_path):
    class DyingWorkers:
        processes = 1

        def submit(self, function, entries, scores):
            future = concurrent.futures.Future()
            if any(entry.name == "deadly" for entry in entries):
                future.set_exception(BrokenProcessPool())
            else:
                future.set_result(function(entries, scores))
            return future

    (tmp_path / "a.png").write_bytes(encoded(photo(0)))
    entries = [Entry(name, f"{tmp_path}/a.png", "") for name in ("first", "deadly", "last")]
    ((group, measured),) = measurements._measure(iter(entries), (), DyingWorkers())
    assert group == entries and "the process that read it died" in measured[1]
    assert [measured[i]["name"] for i in (0, 2)] == ["first", "last"]


def test_the_picture_has_a_row_for_each_reason(folder, tmp_path):
    run_filter(tmp_path / "keep.jsonl", input_dir=folder, output_picture=f"{tmp_path}/dropped.png")
    with Image.open(tmp_path / "dropped.png") as image:
        assert image.height == 6 * 96 + 5 * 4 and image.width > 224 + 96
    rules = {"min_side": 0, "max_aspect_ratio": 0.0, "near_duplicates": -1, "min": "aesthetic:0", "min_contrast": 0.0}
    settings = {**rules, "exact_duplicates": False, "output_picture": f"{tmp_path}/none.png"}
    assert run_filter(tmp_path / "keep.jsonl", input_dir=folder, **settings)["counts"] == {"kept": len(FILES)}
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--input_dir .required unless --measurements of an earlier run is given. is missing"),
        ({"output_file": ""}, "--input_dir .*, --output_file .* are missing"),
        ({"input_dir": "IN", "output_file": ""}, "--output_file .required unless --measurements and .* is missing"),
        ({"measurements": "x", "output_file": ""}, "--output_file .required unless --measurements and .* is missing"),
        ({"input_dir": "IN", "shard": "0/2"}, "--shard=0/2: measures a part .*give --measurements, not --output_file"),
        ({"input_dir": "IN", "shard": "2/2"}, "--shard=2/2: must be i/n"),
        ({"input_dir": "IN", "measurements": "s3://x/y.zst"}, "--measurements=s3://x/y.zst: must be a local path"),
        ({"input_dir": "IN", "keys": "a,b"}, "--keys=a,b: give one"),
        ({"input_dir": "IN", "keys": "png"}, "--keys need tars"),
        ({"input_dir": "IN", "near_duplicates": 9}, r"--near_duplicates=9: must be -1\.\.8"),
        ({"input_dir": "IN", "min": "aesthetic"}, "--min=aesthetic: 'aesthetic' must be FIELD:NUMBER"),
        ({"input_dir": "IN", "blocklist": "IN/none.txt"}, "none.txt: no such file"),
        ({"input_dir": "IN", "output_picture": "x.txt"}, "--output_picture=x.txt: must end with"),
        ({"input_dir": "IN/none"}, "--input_dir=.*none: no such folder"),
        ({"input_dir": "IN", "measurements": "x.jsonl"}, "--measurements=x.jsonl: must end in .zst"),
        ({"measurements": "IN/none.zst"}, "none.zst: no such file|no such file: .*none.zst"),
        ({"measurements": "IN/ugly.json"}, "ugly.json: is not complete, or its .*report.json is missing"),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit_are_refused_before_an_image_is_read(folder, tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(measuring, "measure", None)
    values = {
        name: value.replace("IN", folder) if isinstance(value, str) else value for name, value in settings.items()
    }
    with pytest.raises(UserError, match=message):
        run_main(command, **{"output_file": f"{tmp_path}/keep.jsonl", "workers": 1, **values})
    assert not list(tmp_path.glob("keep*"))


def test_the_list_does_not_replace_what_it_is_made_from(folder, tmp_path):
    measured, blocked, link = (f"{tmp_path}/{name}" for name in ("m.jsonl.zst", "blocked.txt", "link.jsonl"))
    run_main(command, input_dir=folder, measurements=measured, workers=1)
    os.symlink(measured, link)
    with open(blocked, "w") as file:
        file.write("0" * 32)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for output in (measured, link, blocked):
        with pytest.raises(UserError, match=f"--output_file={output}: is an input of this command"):
            run_main(command, measurements=f"{tmp_path}/*.zst", blocklist=blocked, output_file=output)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_missing_column_of_scores_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.parquet: has no column beauty; it has image, aesthetic"):
        run_filter(tmp_path / "keep.jsonl", input_dir=_table(tmp_path / "in"), columns="image", min="beauty:1")


def test_a_table_without_the_scores_is_reported_and_a_damaged_one_is_skipped(tmp_path):
    """Their images and names are those of a build, in which the list is checked."""
    _table(tmp_path / "in")
    write_parquet(tmp_path / "in" / "b.parquet", {"image": [encoded(photo(20))]})
    (tmp_path / "in" / "0.parquet").write_bytes(b"damaged" * 9)
    blocklist = write_blocklist(tmp_path / "blocklist.txt", FILES)
    settings = {"input_dir": str(tmp_path / "in"), "columns": "image", "blocklist": blocklist}
    with pytest.raises(UserError, match=r"b\.parquet: has no column aesthetic; it has image, after 1 others"):
        run_filter(tmp_path / "keep.jsonl", max_errors=1, **settings)
    report = run_filter(tmp_path / "keep.jsonl", max_errors=2, **settings)
    assert {os.path.basename(entry["input"]) for entry in report["skipped"]} == {"0.parquet", "b.parquet"}
    assert report["images"] == len(FILES) + 1 and "b.parquet!0.image" not in kept_names(tmp_path / "keep.jsonl")
    source = detection.find_source(settings["input_dir"], "input_dir", (".png",), (), ("image",))
    kept_items = keep_list.KeptItems(keep_list.read_keep_list(f"{tmp_path}/keep.jsonl"), names_of(source), True)
    kept = [item for item in source.items(Counter(), lambda path, reason: None) if kept_items.contains(item)]
    assert [_file_name(f"a.parquet!{item.location}.image") for item in kept] == KEPT and kept_items.checked_digest()


def test_scores_of_names_with_dots_are_those_of_the_image(tmp_path):
    """A name has its own JSON file or, in a tar, that of its sample: what is before the first dot."""
    scores = {"a.v1": 6, "a.v2": 4, "b": 6, "b.faces": 4, "c": 4, "d.meta": 6}
    files = {f"x/{name}.json": json.dumps({"beauty": score}).encode() for name, score in scores.items()}
    names = ("x/a.v1.jpg", "x/a.v2.jpg", "x/b.jpg", "x/b.seg.jpg", "x/c.seg.jpg", "x/d.jpg")
    files |= {name: encoded(photo(i), "JPEG") for i, name in enumerate(names)}
    (tmp_path / "a.tar").write_bytes(tar_bytes(files))
    write_remote(f"file://{tmp_path}/in", files)
    settings = {"min_contrast": 0.0, "near_duplicates": -1, "min": "beauty:5"}
    run_filter(tmp_path / "keep.jsonl", input_dir=f"{tmp_path}/a.tar", **settings)
    assert kept_names(tmp_path / "keep.jsonl") == [f"a.tar!x/{name}.jpg" for name in ("a.v1", "b", "b.seg")]
    run_filter(tmp_path / "folder.jsonl", input_dir=f"{tmp_path}/in", **settings)
    assert kept_names(tmp_path / "folder.jsonl") == [f"x/{name}.jpg" for name in ("a.v1", "b")]


def test_two_files_of_scores_are_reported(tmp_path):
    image, scores = encoded(photo(0)), b'{"aesthetic": 6}'
    (tmp_path / "a.tar").write_bytes(tar_bytes({"x/1.png": image, "x/1.json": scores, "x/1.JSON": scores}))
    with pytest.raises(UserError, match=r"a\.tar!x/1\.JSON and .*a\.tar!x/1\.json have the same stem: which"):
        run_filter(tmp_path / "keep.jsonl", input_dir=f"{tmp_path}/a.tar")


@pytest.mark.parametrize("source", [_folder, _tars])
def test_a_score_that_no_image_has_is_named(tmp_path, source):
    settings = {"input_dir": source(tmp_path / "in"), "max": "beauty:1,length(aesthetic):9"}
    with pytest.raises(
        UserError, match=r"^--min and --max: no image has the score beauty or length\(aesthetic\): check its name$"
    ):
        run_filter(tmp_path / "keep.jsonl", **settings)
    assert not (tmp_path / "keep.jsonl").exists()


def test_damaged_measurements_are_refused(folder, tmp_path):
    run_filter(tmp_path / "keep.jsonl", input_dir=folder)
    path = tmp_path / "keep.jsonl.measurements.jsonl.zst"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"measurements\.jsonl\.zst: cannot be decompressed"):
        run_filter(tmp_path / "again.jsonl", measurements=str(path))
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"has \d+ bytes, but .*report.json says"):
        run_filter(tmp_path / "again.jsonl", measurements=str(path))
    report = json.loads((tmp_path / f"{path.name}.report.json").read_text())
    assert report["measured"] == len(FILES)
