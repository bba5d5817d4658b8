"""Rows of tables: their names, and cells across row groups and files."""

import collections

from source_kit import write_parquet

from tokenizer.media import folders
from tokenizer.sources import reading
from tokenizer.sources.tables import Tables


def _items(paths, columns=()):
    source = Tables("x", "input_dir", [str(path) for path in paths], columns)
    return list(source.items(collections.Counter(), folders.refuse))


def test_rows_are_named_by_distinct_paths_or_numbered_through_all_files(tmp_path):
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    names = {
        "distinct": (["y/2.png", "/home/me/1.png", "3.png"], ["y/2.png", "1.png", "3.png"]),
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


def test_the_images_of_a_row_share_the_name_of_the_first_column(tmp_path):
    path = tmp_path / "a.parquet"
    cells = {name: [{"bytes": name.encode(), "path": f"{name}_{i}.png"} for i in range(5)] for name in ("b", "a.x")}
    write_parquet(path, cells)
    items = _items([path], ("a.x", "b"))
    assert [(item.name, item.column) for item in items] == [(f"a.x_{i}.png", c) for i in range(5) for c in range(2)]
    assert [reading.open_item(item.address).read() for item in items] == [b"a.x", b"b"] * 5
