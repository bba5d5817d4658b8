"""The same images give the same sentences from every source. Damaged and unsuitable sources are reported by name."""

import re

import numpy as np
import pytest
from build_kit import SETTINGS, SIDE, Killed, build_records, kill_at_line, report_of
from source_kit import files_of, structs, tar_bytes, write_parquet, write_remote, write_tars
from tokenizer_kit import write_image

from EasyLM.errors import UserError
from tokenizer.builders import image_ref, resumable_file


def _tar_range(files, directory):
    write_tars(directory, files)
    return f"{directory}/{{000..001}}.tar"


def _tar_folder(files, directory):
    write_tars(directory / "below", files, 3)
    return str(directory)


def _parquet(files, directory):
    """Rows in another order than that of the names, in two files."""
    cells = structs(files)[::-1]
    write_parquet(directory / "a.parquet", {"number": [*range(len(cells) - 1)], "picture": cells[:-1]})
    write_parquet(directory / "b.parquet", {"number": [0], "picture": cells[-1:]})
    return f"{directory}/*.parquet"


def _parquet_of_bytes(files, directory):
    write_parquet(directory / "a.parquet", {"picture": list(files.values())})
    return str(directory / "a.parquet")


def _saved_dataset(files, directory):
    import datasets

    features = datasets.Features({"picture": datasets.Image()})
    datasets.Dataset.from_dict({"picture": structs(files)}, features).save_to_disk(directory, num_shards=2)
    return str(directory)


def _remote_folder(files, directory):
    return write_remote(f"memory:/{directory}", files)


def _remote_tars(files, directory):
    paths = write_tars(directory, files)
    return write_remote(f"memory:/{directory}", {path.name: path.read_bytes() for path in paths}) + "/*.tar"


SOURCES = (_tar_range, _tar_folder, _parquet, _parquet_of_bytes, _saved_dataset, _remote_folder, _remote_tars)
FOLDER_KINDS = ("images", "frames", "category", "co3d", "video")  # folders matter to most of these
CASES = [("paired", source) for source in SOURCES]
CASES += [(kind, source) for kind in FOLDER_KINDS for source in (_tar_range, _remote_folder)]


def _without_sources(sentences) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "sources"} for _, record in sentences]


@pytest.mark.parametrize(("kind", "source"), CASES, ids=[f"{kind}-{source.__name__[1:]}" for kind, source in CASES])
def test_the_same_images_give_the_same_sentences_from_every_source(tree, tiny, tmp_path, kind, source):
    expected = build_records(tree, tiny, tmp_path / "expected.jsonl", kind, max_errors=1)
    settings = {"max_errors": 1}  # one clip is too short
    for flag in ("input_dir", "target_dir"):
        if SETTINGS[kind].get(flag):
            settings[flag] = source(files_of(tree / SETTINGS[kind][flag]), tmp_path / flag)
    sentences = build_records("", tiny, tmp_path / "out.jsonl", kind, **settings)
    assert sentences and _without_sources(sentences) == _without_sources(expected)
    if "parquet" not in source.__name__ and "dataset" not in source.__name__:
        for (_, record), (_, other) in zip(sentences, expected):
            names = [re.split(r"\.tar!|/(?:input|target)_dir/", path)[-1] for path in record["sources"]]
            assert all(path.endswith(f"/{name}") for path, name in zip(other["sources"], names))


def test_the_masks_of_co3d_depths_are_found_in_other_tars(tree, tiny, tmp_path):
    expected = build_records(tree, tiny, tmp_path / "expected.jsonl", "co3d")
    files = files_of(tree / "co3d")
    for number, folder in enumerate(("images", "masks", "depths", "depth_masks")):
        write_tars(tmp_path / "in" / f"{number}", {n: data for n, data in files.items() if f"/{folder}/" in n}, 1)
    tars = f"{tmp_path}/in/{{0..3}}/000.tar"
    sentences = build_records("", tiny, tmp_path / "out.jsonl", "co3d", input_dir=tars)
    assert len(sentences) == len(expected)
    for (tokens, record), (expected_tokens, _) in zip(sentences, expected):
        np.testing.assert_array_equal(tokens, expected_tokens)
        mask = f"{tmp_path}/in/3/000.tar!apple/110_1/depth_masks/"
        assert [view.partition(mask)[0] for view in record["views"]] == ["plain", "plain", "co3d_depth:"] * 2
        pixels = [pixels for ref in image_ref.from_record(record) for _, pixels in image_ref.read([ref], SIDE)]
        assert len(np.stack(pixels)) == 6


@pytest.mark.parametrize("form", ["keys", "columns", "keys of two sources"])
def test_an_image_and_its_annotation_come_from_one_sample(tree, tiny, tmp_path, form):
    images, labels = (list(files_of(tree / folder).values()) for folder in ("image", "label"))
    samples = {f"a/{i}.png": data for i, data in enumerate(images)}
    annotations = {f"a/{i}.seg.BMP": data for i, data in enumerate(labels)}
    if form == "columns":
        write_parquet(tmp_path / "in.parquet", {"label": labels, "image": images})
        settings = {"input_dir": f"{tmp_path}/in.parquet", "columns": "image,label"}
    elif form == "keys":
        write_tars(tmp_path / "in", {**samples, **annotations})
        settings = {"input_dir": f"{tmp_path}/in", "keys": "png,seg.bmp"}
    else:
        write_tars(tmp_path / "in", samples)
        write_tars(tmp_path / "to", annotations, 3)
        settings = {"input_dir": f"{tmp_path}/in", "target_dir": f"{tmp_path}/to", "keys": "png,seg.bmp"}
    expected = build_records(tree, tiny, tmp_path / "expected.jsonl", "paired")
    settings = {"target_dir": "", **settings}
    assert _without_sources(build_records("", tiny, tmp_path / "out.jsonl", "paired", **settings)) == _without_sources(
        expected
    )


@pytest.mark.parametrize("source", [_tar_range, _parquet])
def test_shards_and_resumed_builds_of_containers_have_the_same_bytes(tree, tiny, tmp_path, monkeypatch, source):
    settings = {"input_dir": source(files_of(tree / "image"), tmp_path / "in")}
    build_records("", tiny, tmp_path / "whole.jsonl", "inpainting", **settings)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    parts = [tmp_path / f"{i}.jsonl" for i in range(2)]
    for i, part in enumerate(parts):
        build_records("", tiny, part, "inpainting", **settings, shard=f"{i}/2")
    assert b"".join(part.read_bytes() for part in parts) == whole
    with monkeypatch.context() as patch:
        patch.setattr(resumable_file, "SAVE_SECONDS", 0)
        kill_at_line(patch, 1)
        with pytest.raises(Killed):
            build_records("", tiny, tmp_path / "again.jsonl", "inpainting", **settings)
    build_records("", tiny, tmp_path / "again.jsonl", "inpainting", **settings)
    assert (tmp_path / "again.jsonl").read_bytes() == whole


def test_unreadable_members_are_named_counted_and_skipped(tree, tiny, tmp_path):
    files = files_of(tree / "image")
    good = {f"{i}.png": data for i, data in enumerate(files.values())}
    write_tars(tmp_path / "in", {**good, "bad.png": b"text"}, 1)
    cut = tar_bytes({"x/whole.png": good["0.png"], "x/cut.png": good["1.png"]})
    (tmp_path / "in" / "cut.tar").write_bytes(cut[: cut.index(b"x/cut.png") + 520])
    (tmp_path / "in" / "empty.tar").write_bytes(b"")
    settings = {"input_dir": f"{tmp_path}/in"}
    sentences = build_records("", tiny, tmp_path / "out.jsonl", "images", max_errors=3, **settings)
    names = [record["sources"][0].removeprefix(f"{tmp_path}/in/") for _, record in sentences]
    assert names == [*(f"000.tar!{name}" for name in good), "cut.tar!x/whole.png"]
    listed = report_of(tmp_path / "out.jsonl")["skipped"]
    skipped = {entry["input"].removeprefix(f"{tmp_path}/in/"): entry["reason"] for entry in listed}
    assert skipped.keys() == {"000.tar!bad.png", "cut.tar", "empty.tar"}
    assert all(path in reason for path, reason in skipped.items())
    with pytest.raises(UserError, match=r"after 2 others .--max_errors=2"):
        build_records("", tiny, tmp_path / "less.jsonl", "images", max_errors=2, **settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("paired", {"keys": "png"}, "--target_dir .required .*unless --keys or --columns lists several. is missing"),
        ("images", {"target_dir": "x"}, "^--target_dir=x: --kind=images has no targets"),
        ("co3d", {"target_dir": "x"}, "^--target_dir=x: --kind=co3d has no targets"),
        ("images", {"keys": "png,bmp"}, "--keys=png,bmp: --kind=images takes 1"),
        ("images", {"keys": "jpg"}, r"000\.tar: has no member with the key jpg; its keys are .*seg.bmp"),
        ("paired", {"keys": "png,depth.png"}, r"no member with the key depth.png; its keys are .*seg.bmp"),
        ("paired", {"keys": "png,PNG"}, "^--keys=png,PNG: has png twice"),
        ("images", {"input_dir": "TMP/in/000.tar", "columns": "png"}, "--columns=png: --input_.*are tars: use --keys"),
        ("images", {"keys": "png", "columns": "image"}, "give one"),
        ("co3d", {"keys": "png"}, "--keys=png: --kind=co3d finds"),
        ("images", {"input_dir": "TMP/table.parquet"}, "has 2 image columns: choose with --columns of image, label"),
        ("images", {"input_dir": "TMP/table.parquet", "columns": "n"}, "n is int64, not bytes; .* image, label"),
        ("images", {"input_dir": "TMP/table.parquet", "columns": "imag"}, "imag does not exist; .* image, label"),
        ("images", {"input_dir": "TMP/table.parquet", "keys": "image"}, "--keys=image: .*is a table: use --columns"),
        ("images", {"input_dir": "TMP/bare.parquet"}, r"has no image column .*its columns are n \(int64\)"),
        ("images", {"input_dir": "TMP/false.parquet"}, "false.parquet: cannot be read .*not a parquet file"),
        ("images", {"input_dir": "TMP/null.parquet"}, r"null.parquet!1.image: has no bytes, only the path x.png"),
        ("images", {"input_dir": "TMP/splits"}, "holds several splits: choose .*splits/train or .*splits/test"),
        ("images", {"input_dir": "TMP/{2..1}.tar"}, r"the range \{2..1\} is backwards"),
        ("images", {"input_dir": "TMP/in/{000..003}.tar"}, "in/001.tar: no such file"),
        ("images", {"input_dir": "TMP/no*.tar"}, r"no file matches .*no\*.tar"),
        ("images", {"input_dir": "TMP/x.tar.gz"}, "x.tar.gz: a compressed tar cannot be read at random"),
        ("images", {"input_dir": "memory://nowhere"}, "--input_dir=memory://nowhere: no such folder"),
        ("images", {"input_dir": "s3://bucket/{0..1}.tar"}, r"--input_dir=s3://.*: .* pip install s3fs"),
        ("images", {"input_dir": "no.tar"}, "^--input_dir=no.tar: no such file$"),
        ("images", {"input_dir": "no{1..2}.parquet"}, r"^--input_.*\{1..2\}.parquet: no such file as no1.parquet$"),
        ("images", {"input_dir": "TMP/{0..8..2}.tar"}, r"no such file; braces hold a range such as {000..019}$"),
        ("images", {"input_dir": "TMP/packed.tar"}, r"packed.tar: is compressed \(gzip\)"),
        ("images", {"input_dir": "TMP/joined.tar"}, "joined.tar: not a whole tar file .*`tar -A`"),
        ("images", {"input_dir": "TMP/twice.tar"}, "twice.tar!a.png and .*twice.tar!a.png have the same name"),
        ("images", {"input_dir": "TMP/x.tar!y/a.tar"}, r"^--input_dir=.*: /.*x.tar!y/a.tar would be read as a member"),
        ("images", {"input_dir": "TMP/folders.tar"}, "folders.tar: contains no file .--max_errors"),
        ("images", {"input_dir": "TMP/above.tar"}, r"above.tar!\.\./b.png: its path leads out of the tar"),
        ("paired", {"input_dir": "TMP/stem.tar", "target_dir": "TMP/stem.tar"},
         r"stem.tar!x/a.jpg and /.*/stem.tar!x/a.png share the stem 'a' "),
        ("images", {"input_dir": "TMP/link.tar"}, "link.tar!b.png: is a link"),
    ],
)  # fmt: skip
def test_unsuitable_sources_are_reported(tiny, tmp_path, kind, settings, message):
    _write_unsuitable(tmp_path)
    settings = {"input_dir": f"{tmp_path}/in", "target_dir": "", "n_shots": 1, **settings}
    for flag in ("input_dir", "target_dir"):
        settings[flag] = settings[flag].replace("TMP", str(tmp_path))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        build_records("", tiny, tmp_path / "out.jsonl", kind, **settings)
    assert "\n" not in str(caught.value)
    assert sorted(path for path in tmp_path.iterdir() if "out.jsonl" not in path.name) == before


def _write_unsuitable(directory) -> None:
    write_image(directory / "a.png", 1)
    image = (directory / "a.png").read_bytes()
    (directory / "a.png").unlink()
    write_tars(directory / "in", {"a.png": image, "a.seg.bmp": image}, 1)
    write_parquet(directory / "table.parquet", {"image": [image], "label": [image], "n": [1]})
    write_parquet(directory / "bare.parquet", {"n": [1]})
    write_parquet(directory / "null.parquet", {"image": [*structs({"y.png": image}), {"bytes": None, "path": "x.png"}]})
    (directory / "false.parquet").write_bytes(b"text " * 9)
    (directory / "splits").mkdir()
    (directory / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    whole = tar_bytes({"a.png": image})
    (directory / "link.tar").write_bytes(tar_bytes({"a.png": image, "b.png": b""}))
    (directory / "x.tar!y").mkdir()
    (directory / "x.tar!y" / "a.tar").write_bytes(whole)
    (directory / "folders.tar").write_bytes(tar_bytes({}))
    (directory / "above.tar").write_bytes(tar_bytes({"a.png": image, "../b.png": image}))
    (directory / "stem.tar").write_bytes(tar_bytes({"x/a.jpg": image, "x/a.png": image}))
    (directory / "twice.tar").write_bytes(tar_bytes([("a.png", image)] * 2))
    (directory / "packed.tar").write_bytes(b"\x1f\x8b" + whole)
    (directory / "joined.tar").write_bytes(whole + whole)
