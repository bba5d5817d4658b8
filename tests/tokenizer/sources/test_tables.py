"""Rows of tables: their names, and cells across row groups and files."""

import collections
import gc
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from source_kit import write_parquet

from EasyLM.errors import UserError
from tokenizer.media import folders
from tokenizer.sources import reading, table_files, tables
from tokenizer.sources.tables import Tables


def _items(paths, columns=()):
    source = Tables("x", "input_dir", [str(path) for path in paths], columns)
    return list(source.items(collections.Counter(), folders.refuse))


def test_rows_are_named_by_distinct_paths_or_numbered_through_all_files(tmp_path):
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    names = {
        "distinct": (["./y/2.png", "/home/me/1.png", "3.png"], ["y/2.png", "1.png", "3.png"]),
        "repeated": (["1.png", "x.png", "1.png"], None),
        "missing": (["1.png", None, "2.png"], None),
        "one folder each": (["/a/1.png", "/b/1.png", "2.png"], None),
    }
    for paths, expected in names.values():
        cells = [{"bytes": b"%d" % i, "path": path} for i, path in enumerate(paths)]
        write_parquet(first, {"image": cells[:2]}, 1)
        write_parquet(second, {"image": cells[2:]}, 1)
        items = _items([first, second])
        assert [item.name for item in items] == (expected or [f"{row:012d}" for row in range(3)])
        assert [item.address for item in items] == [
            f"{first}!0.image",
            f"{first}!1.image",
            f"{second}!0.image",
        ]
        assert [reading.open_item(item.address, item.location).read() for item in items] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view", "dictionary"])
@pytest.mark.parametrize("has_path", [False, True])
def test_types_of_bytes(tmp_path, kind, has_path):
    """Other writers than pyarrow keep types of their own in the file's schema."""
    values = [b"0", b"1", None]
    types = {"large_binary": pyarrow.large_binary(), "binary_view": pyarrow.binary_view()}
    array = pyarrow.array(values, types.get(kind, pyarrow.binary()))
    array = array.dictionary_encode() if kind == "dictionary" else array
    if has_path:
        array = pyarrow.StructArray.from_arrays([array, pyarrow.array(["a.png", "b.png", "c.png"])], ["bytes", "path"])
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": array}), path)
    items = _items([path])
    assert [item.name for item in items] == (
        ["a.png", "b.png", "c.png"] if has_path else [f"{i:012d}" for i in range(3)]
    )
    assert [reading.open_item(item.address, item.location).read() for item in items[:2]] == values[:2]
    with pytest.raises(UserError, match=r"a\.parquet!2\.image: has no bytes"):
        reading.open_item(items[2].address, items[2].location)


def test_rows_whose_names_share_a_stem_are_numbered(tmp_path):
    """An image and its annotation have the same stem: two images of one stem could not be told apart."""
    cells = [{"bytes": b"%d" % i, "path": path} for i, path in enumerate(["a/1.png", "a/1.jpg", "a/2.png"])]
    write_parquet(tmp_path / "a.parquet", {"image": cells})
    assert [item.name for item in _items([tmp_path / "a.parquet"])] == [f"{row:012d}" for row in range(3)]


def test_a_file_whose_names_are_damaged_is_reported_and_the_others_are_used(tmp_path):
    paths = [tmp_path / f"{i}.parquet" for i in range(3)]
    for path in paths:
        cells = [{"bytes": b"x", "path": f"{path.stem}/{row}.png"} for row in range(3)]
        write_parquet(path, {"image": cells}, 3)
    group = pyarrow.parquet.read_metadata(paths[1]).row_group(0)
    names = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.endswith("path"))
    data = bytearray(paths[1].read_bytes())
    start = names.dictionary_page_offset or names.data_page_offset
    data[start : start + 8] = b"\xff" * 8
    paths[1].write_bytes(data)
    reports = []
    source = Tables("x", "input_dir", [str(path) for path in paths], ())
    items = list(source.items(collections.Counter(), lambda path, reason: reports.append((path, reason))))
    assert [item.name for item in items] == [f"{i}/{row}.png" for i in (0, 2) for row in range(3)]
    ((path, reason),) = reports
    assert path == str(paths[1]) and reason.startswith(f"{path}: cannot be read")


def test_the_names_of_rows_take_9_bytes_each(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "_NAMES_AT_A_TIME", 100)
    count, path = 20_000, tmp_path / "a.parquet"
    write_parquet(path, {"image": [{"bytes": b"x", "path": f"{row}.png"} for row in range(count)]}, 1000)
    usable = list(Tables("x", "input_dir", [str(path)], ())._tables(folders.refuse))
    tracemalloc.start()
    try:
        assert tables._check_names(usable, folders.refuse)[1]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 8 * count < peak < 12 * count


def test_a_damaged_file_does_not_shift_the_numbers_of_the_next_rows(tmp_path):
    """Rows without names are matched by their numbers."""
    inputs, targets = ([tmp_path / f"{side}{i}.parquet" for i in range(3)] for side in "xy")
    for i, path in enumerate([*inputs, *targets]):
        write_parquet(path, {"image": [b"%d %d" % (i % 3, row) for row in range(2)]})
    errors = []

    def rows(paths):
        source = Tables("x", "input_dir", [str(path) for path in paths], ())
        items = source.items(collections.Counter(), lambda path, reason: errors.append(reason))
        return {item.name: reading.open_item(item.address, item.location).read() for item in items}

    assert rows(inputs) == rows(targets) and not errors
    inputs[1].write_bytes(b"PAR1")
    targets[2].write_bytes(b"PAR1")
    left, right = rows(inputs), rows(targets)
    assert len(errors) == 2
    assert left.keys() & right.keys() and all(left[name] == right[name] for name in left.keys() & right.keys())
    assert sorted(left.values()) == [b"0 0", b"0 1", b"2 0", b"2 1"]
    inputs[1].write_bytes(inputs[0].read_bytes())
    assert not left.keys() & rows(inputs).keys()  # numbers through all files are not those of single files


def test_the_images_of_a_row_share_the_name_of_the_first_column(tmp_path):
    path = tmp_path / "a.parquet"
    cells = {name: [{"bytes": name.encode(), "path": f"{name}_{i}.png"} for i in range(5)] for name in ("b", "a.x")}
    write_parquet(path, cells)
    items = _items([path], ("a.x", "b"))
    assert [(item.name, item.column) for item in items] == [(f"a.x_{i}.png", c) for i in range(5) for c in range(2)]
    assert [reading.open_item(item.address).read() for item in items] == [b"a.x", b"b"] * 5


def test_a_damaged_arrow_file_is_an_error_and_does_not_end_the_process(tmp_path):
    """Arrow trusts the offsets in a file: reading beyond its buffers would end the process."""
    path = tmp_path / "data.arrow"
    with pyarrow.ipc.new_stream(path, pyarrow.schema({"image": pyarrow.binary()})) as file:
        file.write(pyarrow.record_batch([pyarrow.array([b"pixel"])], ["image"]))
    whole, good = path.read_bytes(), b"\0\0\0\0\5\0\0\0pixel"
    assert [reading.open_item(item.address).read() for item in _items([path])] == [b"pixel"] and whole.count(good) == 1
    path.write_bytes(whole.replace(good, b"\0\0\0\0\xff\xff\xff\x7fpixel"))
    with pytest.raises(UserError, match=r"data.arrow: cannot be read"):
        reading.open_item(f"{path}!0.image")


def test_few_row_groups_stay_in_memory(tmp_path):
    """Of eight files with row groups of a megabyte. A cycle of references would keep them until a collection."""
    paths = [tmp_path / f"{i}.parquet" for i in range(8)]
    for i, path in enumerate(paths):
        write_parquet(path, {"image": [bytes([i]) * (1 << 20)] * 3, "label": [b"%d" % i] * 3}, 1)
    pool = pyarrow.default_memory_pool()
    gc.collect()
    before, most = pool.bytes_allocated(), 0
    gc.disable()
    try:
        for row in range(3):
            for i, path in enumerate(paths):
                assert reading.open_item(f"{path}!{row}.image").read() == bytes([i]) * (1 << 20)
                assert reading.open_item(f"{path}!{row}.label").read() == b"%d" % i
                most = max(most, pool.bytes_allocated() - before)
    finally:
        gc.enable()
    assert most < 6 << 20
