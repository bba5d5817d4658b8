"""The index contains items and rows in order. Its digest changes with the files, and it counts ignored files."""

import sqlite3

import pytest
from index_kit import make_index

from EasyLM.errors import UserError
from EasyLM.skipped_inputs import SkippedInputs
from tokenizer.builders import file_index
from tokenizer.builders.file_index import FileIndex
from tokenizer.builders.image_ref import ImageRef
from tokenizer.media import images
from tokenizer.sources.local import LocalFolder, Subfolders


def test_items_have_rows_in_order_and_the_digest_changes_with_the_files():
    names = ["b/f10.png", "b/f9.png", "a/x.png", "b/f9a.png", "b/f09.png"]
    clips, _ = make_index(names, file_index.by_clip)
    assert [[row[0].path for row in clips.rows(i)] for i in range(len(clips))] == [
        ["0/a/x.png"],
        ["0/b/f09.png", "0/b/f9.png", "0/b/f9a.png", "0/b/f10.png"],
    ]
    assert clips.sizes().tolist() == [1, 4] and clips.row(1, 3) == (ImageRef("0/b/f10.png"),)
    assert clips.digest == make_index(names[::-1], file_index.by_clip)[0].digest
    assert clips.digest != make_index(names[1:], file_index.by_clip)[0].digest
    aligned, skipped = make_index([["1.png", "2.png", "4.png"], ["2.jpg", "3.jpg", "4.gif"]], file_index.by_stem)
    assert [aligned.rows(i) for i in range(len(aligned))] == [
        [(ImageRef(f"0/{stem}.png"), ImageRef(f"1/{stem}.{ending}"))] for stem, ending in (("2", "jpg"), ("4", "gif"))
    ]
    assert list(skipped.reasons.values()) == [
        "0/1.png has no partner in --input_dir=1",
        "1/3.jpg has no partner in --input_dir=0",
    ]


def test_ignored_files_are_counted_once_per_directory(tmp_path):
    for name in ("x/s/images/1.jpg", "x/s/masks/1.png", "x/s/pointcloud.ply", "x/frame_annotations.jgz", "y/1.ply"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    source = Subfolders(LocalFolder(str(tmp_path), "input_dir", images.IMAGE_EXTENSIONS), ("images", "masks"))
    index = FileIndex(file_index.by_co3d_sequence, [source], SkippedInputs(0))
    assert index.ignored == {".ply": 2, ".jgz": 1}


def test_an_index_larger_than_the_disk_is_reported(monkeypatch):
    connect = sqlite3.connect

    def small(name):
        database = connect(name)
        database.execute("PRAGMA max_page_count = 8")
        return database

    monkeypatch.setattr(sqlite3, "connect", small)
    monkeypatch.setenv("TMPDIR", "/full")
    with pytest.raises(UserError, match=r"does not fit in /full \(.*disk is full\): set \$TMPDIR to"):
        make_index([f"{number:0100d}.png" for number in range(1000)], file_index.by_name)
