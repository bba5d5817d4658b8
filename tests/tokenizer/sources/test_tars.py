"""Members of tars: names, samples, order of keys, random access, memory."""

import collections
import subprocess
import tracemalloc

import pytest
from source_kit import tar_bytes

from EasyLM.errors import UserError
from tokenizer.media import folders
from tokenizer.sources import reading, tars
from tokenizer.sources.tars import Tars


def _items(path, keys=(), report=folders.refuse):
    source = Tars(str(path), "input_dir", [str(path)], (".png",), keys)
    return sorted(source.items(collections.Counter(), report))


def test_members_are_named_as_files_or_as_samples(tmp_path):
    names = ["./a/./1.0.png", "b.PNG", "b.Seg.png", "c.jpg", ".d/e.png", "f/._g.png", "/h.png"]
    path = tmp_path / "in.TAR"
    path.write_bytes(tar_bytes({name: name.encode() for name in names}))
    visible = ["a/1.0.png", "b.PNG", "b.Seg.png", "h.png"]
    assert [item.name for item in _items(path)] == visible
    assert [item.address for item in _items(path)] == [f"{path}!{name}" for name in visible]
    samples = _items(path, ("png", "seg.png"))
    assert [(item.name, item.column) for item in samples] == [("b.png", 0), ("b.png", 1), ("h.png", 0)]
    for item in [*_items(path), *samples]:
        for location in (item.location, ""):  # a record does not hold the location
            opened = reading.open_item(item.address, location)
            assert opened.read().decode().lstrip("./").replace("/./", "/") == item.address.rpartition("!")[2]
            assert str(opened) == item.address


def test_a_sparse_file_does_not_end_the_listing(tmp_path):
    """Its header says the size outside of the tar."""
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(1 << 20)
    (tmp_path / "b.png").write_bytes(b"pixels")
    subprocess.run(["tar", "-cSf", "in.tar", "a.png", "b.png"], cwd=tmp_path, check=True)
    errors = []
    (item,) = _items(tmp_path / "in.tar", report=lambda path, reason: errors.append(reason))
    assert item.name == "b.png" and reading.open_item(item.address, item.location).read() == b"pixels"
    assert len(errors) == 1 and "in.tar!a.png: is a link, a device or a sparse file" in errors[0]


def test_a_member_is_read_at_its_place_and_named_when_the_tar_has_shrunk(tmp_path):
    path = tmp_path / "in.tar"
    path.write_bytes(tar_bytes({"a.png": b"a" * 700, "b.png": b"b" * 700}))
    _, item = _items(path)
    path.write_bytes(path.read_bytes()[: int(item.location.partition("+")[0]) + 100])
    with pytest.raises(UserError, match=r"in.tar!b.png: ends at byte \d+; it was longer"):
        reading.open_item(item.address, item.location)
    with pytest.raises(UserError, match=r"in.tar: not a whole tar file \(it is truncated inside b.png\)"):
        reading.open_item(item.address)


def test_a_damaged_header_and_a_missing_end_are_errors(tmp_path):
    """tarfile takes both for the end of the archive."""
    whole = tar_bytes({"a.png": b"a" * 9, "b.png": b"b" * 9})
    damaged = bytearray(whole)
    damaged[1024 + 150] ^= 1  # in the checksum of the second header
    path = tmp_path / "in.tar"
    cases = {
        bytes(damaged): "a header is damaged",
        whole[:2048]: "its end mark is missing",
        whole[:-99]: "not a whole number of blocks",  # as where a member was cut out
    }
    for data, reason in cases.items():
        path.write_bytes(data)
        errors = {}
        items = _items(path, report=errors.__setitem__)
        assert [item.name for item in items] == (["a.png"] if data == damaged else ["a.png", "b.png"])
        assert list(errors) == [str(path)] and reason in errors[str(path)]


def test_listing_a_tar_keeps_none_of_its_members_in_memory(tmp_path):
    path = tmp_path / "in.tar"
    path.write_bytes(tar_bytes({f"{i}.png": b"x" for i in range(1500)}))
    tracemalloc.start()
    try:
        assert sum(1 for _ in tars.list_members(str(path))) == 1500
        assert tracemalloc.get_traced_memory()[1] < 400_000  # all members together take more than a megabyte
    finally:
        tracemalloc.stop()


def test_a_local_file_has_precedence_over_a_member(tmp_path):
    path = tmp_path / "a.tar!b.png"
    path.write_bytes(b"x")
    assert reading.open_item(str(path)) == str(path)
    assert reading.folder_of(str(path)) == str(tmp_path)
    assert reading.folder_of("x/a.tar!b.png") == "x/a.tar"
    assert reading.folder_of("x/a.tar!clip/b.png") == "x/a.tar!clip"
