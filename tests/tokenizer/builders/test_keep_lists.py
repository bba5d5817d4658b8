"""A build with a keep list gives the sentences of the kept images alone. A list of another source is refused."""

import gzip
import json
import shutil

import pytest
from build_kit import build_records, report_of
from filter_kit import run_filter
from source_kit import files_of, write_parquet, write_tars
from tokenizer_kit import run_main

from EasyLM.data import records
from EasyLM.errors import UserError
from tokenizer import build

RULES = {"min_side": 0, "max_aspect_ratio": 0.0, "min": "", "near_duplicates": -1}


@pytest.fixture
def images(tree, tmp_path):
    """Five images with labels, and two copies whose labels are of other images."""
    shutil.copytree(tree / "image", tmp_path / "image")
    shutil.copytree(tree / "label", tmp_path / "label")
    for copy, original in {"7": "1", "9": "3"}.items():
        shutil.copy(tmp_path / "image" / f"{original}.png", tmp_path / "image" / f"{copy}.png")
        shutil.copy(tmp_path / "label" / "0.BMP", tmp_path / "label" / f"{copy}.BMP")
    return tmp_path


def _plain(sentences) -> list:
    return [
        (ids.tolist(), [path.rpartition("/")[2].rpartition("!")[2] for path in r["sources"]]) for ids, r in sentences
    ]


@pytest.mark.parametrize("kind", ["images", "paired"])
@pytest.mark.parametrize("form", ["folder", "tars"])
def test_a_build_with_a_keep_list_is_that_of_the_kept_images(tree, images, tiny, tmp_path, kind, form):
    settings = {"input_dir": str(images / "image"), "n_shots": 2, "n_epochs": 2}
    if kind == "paired":
        settings["target_dir"] = str(images / "label")
    if form == "tars":
        for flag in ("input_dir", "target_dir"):
            if flag in settings:
                write_tars(tmp_path / flag, files_of(images / settings[flag].rpartition("/")[2]))
                settings[flag] = str(tmp_path / flag)
    report = run_filter(tmp_path / "keep.jsonl.gz", input_dir=settings["input_dir"], **RULES)
    assert report["counts"] == {"kept": 5, "--exact_duplicates": 2}
    kept = build_records("", tiny, tmp_path / "kept.jsonl", kind, keep=f"{tmp_path}/keep.jsonl.gz", **settings)
    assert report_of(tmp_path / "kept.jsonl")["not_kept"] == 2 and not report_of(tmp_path / "kept.jsonl")["skipped"]
    if form == "tars":  # the first ones in the order of the members, which is reversed, are kept
        names = {path for _, names in _plain(kept) for path in names}
        assert len(names & {f"{i}.png" for i in range(10)}) == 5 and "9.png" in names and "3.png" not in names
        return
    reduced = {**settings, "input_dir": str(tree / "image")}
    if kind == "paired":
        reduced["target_dir"] = str(tree / "label")
    assert _plain(kept) == _plain(build_records("", tiny, tmp_path / "reduced.jsonl", kind, **reduced))


def test_other_kept_images_are_other_inputs(images, tiny, tmp_path):
    settings = {"input_dir": str(images / "image"), "keep": f"{tmp_path}/keep.jsonl"}
    run_filter(tmp_path / "keep.jsonl", input_dir=settings["input_dir"], **RULES)
    build_records("", tiny, tmp_path / "a.jsonl", "images", **settings)
    first = report_of(tmp_path / "a.jsonl")["identity"]["inputs"]
    run_filter(tmp_path / "keep.jsonl", input_dir=settings["input_dir"], **{**RULES, "exact_duplicates": False})
    assert len(build_records("", tiny, tmp_path / "a.jsonl", "images", **settings)) == 7
    assert report_of(tmp_path / "a.jsonl")["identity"]["inputs"] != first
    run_filter(tmp_path / "keep.jsonl", input_dir=settings["input_dir"], **{**RULES, "min_side": 1000})
    with pytest.raises(UserError, match="no sentence was built, 0 inputs skipped, 7 not kept"):
        build_records("", tiny, tmp_path / "a.jsonl", "images", **settings)


def test_rows_of_a_table_are_kept_by_their_numbers(images, tiny, tmp_path):
    data, labels = (list(files_of(images / folder).values()) for folder in ("image", "label"))
    write_parquet(tmp_path / "a.parquet", {"image": data, "label": labels})
    table = f"{tmp_path}/a.parquet"
    run_filter(tmp_path / "keep.jsonl", input_dir=table, columns="image", **RULES)
    settings = {"input_dir": table, "target_dir": "", "columns": "image,label", "n_shots": 1, "n_epochs": 1}
    settings["keep"] = f"{tmp_path}/keep.jsonl"
    sentences = build_records("", tiny, tmp_path / "a.jsonl", "paired", **settings)
    rows = sorted(record["sources"][0].rpartition("!")[2] for _, record in sentences)
    assert rows == [f"{row}.image" for row in range(5)]


def test_each_tar_can_be_a_part(images, tiny, tmp_path):
    """Members of different tars may have the same name."""
    for number, copies in enumerate(("0123", "4719")):
        files = {f"{i}.png": (images / "image" / f"{copy}.png").read_bytes() for i, copy in enumerate(copies)}
        write_tars(tmp_path / "in" / str(number), files, 1)
        (tmp_path / "in" / str(number) / "000.tar").rename(tmp_path / "in" / f"{number}.tar")
    source = f"{tmp_path}/in/{{0..1}}.tar"
    run_filter(tmp_path / "keep.jsonl", input_dir=source, **RULES)
    settings = {"input_dir": source, "keep": f"{tmp_path}/keep.jsonl", "shard": "auto", "parts": "files"}
    run_main(build, kind="images", vqgan=tiny, output_file=f"{tmp_path}/{{i}}.jsonl", workers=1, **settings)
    sources = [r["sources"][0] for i in range(2) for _, r in records.read_records(f"{tmp_path}/{i}.jsonl", 32)]
    # 0.tar has all four, in reverse order; of 1.tar, 4 is new, and 7, 1 and 9 are copies.
    assert sources == [f"{tmp_path}/in/0.tar!{i}.png" for i in range(4)] + [f"{tmp_path}/in/1.tar!0.png"]
    assert [report_of(tmp_path / f"{i}.jsonl")["not_kept"] for i in range(2)] == [0, 3]
    run_filter(tmp_path / "keep.jsonl", input_dir=source, **{**RULES, "exact_duplicates": False})
    run_main(build, kind="images", vqgan=tiny, output_file=f"{tmp_path}/{{i}}.jsonl", workers=1, **settings)
    assert [report_of(tmp_path / f"{i}.jsonl")["sentences"] for i in range(2)] == [4, 4]  # another list, other parts
    (tmp_path / "in").rename(tmp_path / "moved")
    (tmp_path / "moved" / "0.tar").rename(tmp_path / "moved" / "2.tar")
    moved = {"input_dir": f"{tmp_path}/moved/{{1..2}}.tar", "keep": settings["keep"]}
    with pytest.raises(UserError, match=r"is the list of another source: of 0\.tar, not of 2\.tar$"):
        build_records("", tiny, tmp_path / "c.jsonl", "images", **moved)
    (tmp_path / "moved").rename(tmp_path / "in")
    (tmp_path / "in" / "2.tar").rename(tmp_path / "in" / "0.tar")
    shutil.copy(tmp_path / "in" / "0.tar", tmp_path / "in" / "1.tar")
    settings["max_errors"] = 9
    with pytest.raises(UserError, match=r"another source.*1\.tar"):
        run_main(build, kind="images", vqgan=tiny, output_file=f"{tmp_path}/b{{i}}.jsonl", workers=1, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("added", "is the list of another source: of 7 images, but the inputs are 8"),
        ("renamed", "is the list of another source: the images in the folder have other names"),
        ("written", r"is the list of another source, or its images have changed: .*0\.png has other contents"),
        ("cut", "is truncated, or not a list of tokenizer.filter"),
        ("text", r"keep.jsonl:1: not a line of a list of tokenizer.filter: not JSON"),
        ("object", r"keep.jsonl:1: lacks the key 'keep_list'"),
        ("joined", r"keep.jsonl:7: follows the last line of the list"),
        ("old", "is of version 0, not 1: filter again"),
        ("missing", "no such file"),
    ],
)
def test_a_list_of_other_images_is_refused(images, tiny, tmp_path, change, message):
    path, folder = tmp_path / "keep.jsonl", images / "image"
    run_filter(path, input_dir=str(folder), **RULES)
    text = path.read_text()
    if change == "added":
        shutil.copy(folder / "0.png", folder / "99.png")
    elif change == "renamed":
        (folder / "0.png").rename(folder / "00.png")
    elif change == "written":
        shutil.copy(folder / "1.png", folder / "0.png")
    elif change == "missing":
        path.unlink()
    else:
        old = text.replace('"keep_list":1', '"keep_list":0')
        changed = {"cut": text[: text.index("{")], "text": "0.png\n", "object": "{}\n", "joined": text * 2, "old": old}
        path.write_text(changed[change])
    with pytest.raises(UserError, match=f"^--keep={tmp_path}/.*{message}"):
        build_records("", tiny, tmp_path / "a.jsonl", "images", input_dir=str(folder), keep=str(path))


def test_lists_are_for_single_images_and_compressed_by_their_names(tree, images, tiny, tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"):
        run_filter(tmp_path / name, input_dir=str(images / "image"), **RULES)
    settings = {"input_dir": str(images / "image")}
    built = [
        _plain(build_records("", tiny, tmp_path / f"{i}.jsonl", "images", keep=f"{tmp_path}/{name}", **settings))
        for i, name in enumerate(("a.jsonl", "a.jsonl.gz", "a.jsonl.zst"))
    ]
    assert built[0] == built[1] == built[2]
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == (tmp_path / "a.jsonl").read_bytes()
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[-1])["kept"] == 5
    with pytest.raises(UserError, match=r"a keep list is for the kinds of single images: images, paired, .*category$"):
        build_records(tree, tiny, tmp_path / "b.jsonl", "frames", keep=f"{tmp_path}/a.jsonl")


def test_a_build_does_not_replace_its_list(images, tiny, tmp_path):
    run_filter(tmp_path / "a.jsonl", input_dir=str(images / "image"), **RULES)
    settings = {"input_dir": str(images / "image"), "keep": f"{tmp_path}/a.jsonl"}
    with pytest.raises(UserError, match=r"--output_file=.*a\.jsonl: is an input of this command"):
        build_records("", tiny, tmp_path / "a.jsonl", "images", **settings)
    with pytest.raises(UserError, match=r"--output_file=.*a\.jsonl: is an input of this command"):
        build_records("", tiny, tmp_path / "a.jsonl", "images", **settings, fresh=True)
