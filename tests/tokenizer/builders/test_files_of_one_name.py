"""Tars and tables of one name in different folders are told apart by keep lists, blocklists and scores."""

import hashlib
import json

import pytest
from build_kit import build_records, report_of
from filter_kit import kept_names, run_filter
from source_kit import tar_bytes, write_parquet
from tokenizer_kit import run_main, write_image

from EasyLM.data import records
from EasyLM.errors import UserError
from tokenizer import build
from tokenizer.filter import __main__ as filter_command
from tokenizer.sources import container_files
from tokenizer.sources.local import LocalFolder
from tokenizer.sources.tars import Tars

RULES = {"min_side": 0, "max_aspect_ratio": 0.0, "min": "", "near_duplicates": -1}


@pytest.fixture
def images(tmp_path) -> dict[str, list[bytes]]:
    """Three different images for each of two sources."""
    for seed in range(6):
        write_image(tmp_path / "images" / f"{seed}.png", seed)
    contents = [(tmp_path / "images" / f"{seed}.png").read_bytes() for seed in range(6)]
    return {"de": contents[:3], "en": contents[3:]}


def write_source(root, form: str, folders: dict[str, str], images) -> str:
    """Writes the images of each language into a file of the same name in its folder; returns the value of the flag."""
    for language, contents in images.items():
        folder = root / folders[language]
        if form == "parquet":
            write_parquet(folder / "000.parquet", {"image": contents})
        else:
            folder.mkdir(parents=True)
            # All members differ, as a build takes the tars for one folder.
            members = {f"{language}{i}.png": data for i, data in enumerate(contents)}
            (folder / "000.tar").write_bytes(tar_bytes(members))
    return f"{root}/**/000.{form}"


@pytest.mark.parametrize("form", ["tar", "parquet"])
@pytest.mark.parametrize("by_files", [False, True])
@pytest.mark.parametrize("names", [("de/000", "en/000"), ("000", "en/000")])  # in the list
def test_a_blocked_image_of_one_file_is_dropped_and_that_of_the_other_is_kept(
    images, tiny, tmp_path, form, by_files, names
):
    folders = {language: name.rpartition("/")[0] for language, name in zip(images, names)}
    input_dir = write_source(tmp_path / "in", form, folders, images)
    (tmp_path / "blocked.txt").write_text(hashlib.md5(images["en"][1]).hexdigest())
    run_filter(tmp_path / "keep.jsonl", input_dir=input_dir, blocklist=f"{tmp_path}/blocked.txt", **RULES)
    members = {name: [f"{name}{i}.png" if form == "tar" else f"{i}.image" for i in range(3)] for name in images}
    members["en"].pop(1)
    kept = [f"{name}.{form}!{member}" for name, language in zip(names, images) for member in members[language]]
    assert kept_names(tmp_path / "keep.jsonl") == kept
    (tmp_path / "in").rename(tmp_path / "moved")  # the names do not depend on where the source is
    settings = {"input_dir": input_dir.replace("/in/", "/moved/"), "keep": f"{tmp_path}/keep.jsonl"}
    if by_files:
        settings |= {"shard": "auto", "parts": "files", "workers": 1, "batch_size": 8}
        run_main(build, kind="images", vqgan=tiny, output_file=f"{tmp_path}/{{i}}.jsonl", **settings)
        parts = [f"{tmp_path}/{i}.jsonl" for i in range(2)]
        sentences = [sentence for part in parts for sentence in records.read_records(part, 32)]
        assert [report_of(part)["not_kept"] for part in parts] == [0, 1]
    else:
        sentences = build_records("", tiny, tmp_path / "out.jsonl", "images", **settings)
    sources = [record["sources"][0].removeprefix(f"{tmp_path}/moved/") for _, record in sentences]
    assert sorted(sources) == kept


def test_scores_are_those_of_the_same_tar(images, tmp_path):
    """Samples of different tars may have the same name."""
    for folder, contents in images.items():
        members = {f"{i}.png": data for i, data in enumerate(contents)}
        scores = {f"{i}.json": json.dumps({"beauty": 3 if folder == "de" else i}).encode() for i in range(3)}
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "000.tar").write_bytes(tar_bytes({**members, **scores}))
    settings = {**RULES, "min": "beauty:2", "input_dir": f"{tmp_path}/in/*/000.tar"}
    run_filter(tmp_path / "keep.jsonl", **settings)
    kept = [f"de/000.tar!{i}.png" for i in range(3)] + ["en/000.tar!2.png"]
    assert kept_names(tmp_path / "keep.jsonl") == kept
    for part in range(2):
        sharded = {"measurements": f"{tmp_path}/{{i}}.zst", "shard": f"{part}/2", "workers": 1}
        run_main(filter_command, **{**settings, **sharded})
    run_filter(tmp_path / "merged.jsonl", **{**settings, "input_dir": "", "measurements": f"{tmp_path}/?.zst"})
    assert (tmp_path / "merged.jsonl").read_bytes() == (tmp_path / "keep.jsonl").read_bytes()


def test_a_list_that_does_not_tell_the_files_apart_is_refused(images, tiny, tmp_path):
    """Earlier versions left out the folders."""
    input_dir = write_source(tmp_path / "in", "parquet", {"de": "de", "en": "en"}, images)
    path = tmp_path / "keep.jsonl"
    run_filter(path, input_dir=input_dir, **RULES)
    *names, footer = path.read_text().splitlines()
    footer = json.loads(footer)
    footer["files"] = {"000.parquet": [6, "0" * 32]}
    old = [name.replace("de/", "").replace("en/", "") for name in names]
    path.write_text("\n".join([*old, json.dumps(footer)]) + "\n")
    message = r"another source: it has one 000\.parquet, but the inputs are de/000\.parquet and en/000\.parquet$"
    with pytest.raises(UserError, match=message):
        build_records("", tiny, tmp_path / "out.jsonl", "images", input_dir=input_dir, keep=str(path))


def test_files_are_named_by_as_few_folders_as_tell_them_apart():
    def names(*paths: str) -> list[str]:
        return list(container_files.names_of(Tars("x", "input_dir", paths, (".png",))).values())

    assert names("/data/a/0.tar", "/data/b/1.tar") == ["0.tar", "1.tar"]
    assert names("/data/a/0.tar") == names("a/0.tar") == names("0.tar") == ["0.tar"]
    assert names("s3://x/data/a/0.tar", "s3://x/data/ab/0.tar", "s3://x/data/c/d/1.tar") == [
        "a/0.tar",
        "ab/0.tar",
        "c/d/1.tar",
    ]
    assert names("in/0.tar", "in/more/0.tar") == ["0.tar", "more/0.tar"]
    assert container_files.names_of(LocalFolder("in", "input_dir", (".png",))) == {}
