"""Tables of images: the image columns of the files that `table_files` reads.

The rows of a source count through all its files. The `path` of the first column's cells names the rows, as files in a
folder, if each row has one and their stems differ; otherwise the row numbers do. If a file cannot be read, the rows of
each file count by themselves, so that the numbers of the next files do not shift.
"""

import collections
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from EasyLM.errors import UnavailableError, UserError
from EasyLM.storage import file_version
from tokenizer.media import folders
from tokenizer.media.folders import Report
from tokenizer.sources.items import Item
from tokenizer.sources.table_files import names_file, open_table

_Table = tuple[int, str, str, tuple[str, ...], int]  # number of the file, path, version, image columns, rows


@dataclasses.dataclass(frozen=True)
class Tables:
    """The cells of image columns.

    Attributes:
      value: the flag's value.
      flag_name: the flag.
      paths: of the files, in the order of their rows.
      chosen: image columns; none: the only image column of the files.
      others: further columns. A file that lacks one is reported; its images count all the same.
    """

    value: str
    flag_name: str
    paths: Sequence[str]
    chosen: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """`--input_dir=FILES`."""
        return f"--{self.flag_name}={self.value}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The image columns."""
        return self.chosen or ("",)

    def items(self, ignored: collections.Counter, report: Report) -> Iterator[Item]:
        """Yields the cells. Reports a file that is missing or damaged, or lacks a column.

        Raises:
          UserError: naming the flag, if there is no row.
          UnavailableError: naming a file, if its store cannot be reached; or pyarrow, if it is not installed.
        """
        tables, named = _check_names(list(self._tables(report)), report)
        all_usable = len(tables) == len(self.paths)
        first_row = 0
        for file, path, version, columns, size in tables:
            for row, name in enumerate(_row_names(path, columns[0]) if named else [None] * size):
                for column, label in enumerate(columns):
                    address = f"{path}!{row}.{label}"
                    number = f"{first_row + row:012d}" if all_usable else f"{file:06d}-{row:012d}"
                    yield Item(name or number, column, address, str(row), f"{version} {address}")
            first_row += size
        if not first_row:
            raise UserError(f"{self.flag}: has no row")

    def _tables(self, report: Report) -> Iterator["_Table"]:
        """Yields each usable file."""
        for file, path in enumerate(self.paths):
            try:
                version = " ".join(map(str, file_version(path).values()))
                table = open_table(path)
                columns = self.chosen or _only_image_column(path, table.schema)
                for column in columns:
                    _check_image_column(path, table.schema, column)
            except UnavailableError:
                raise
            except UserError as error:
                report(path, str(error))
            else:
                if missing := [name for name in self.others if name not in table.schema.names]:
                    report(path, f"{path}: has no column {missing[0]}; it has {', '.join(table.schema.names)}")
                yield file, path, version, columns, table.num_rows


def _is_image_type(kind: Any) -> bool:
    """Whether cells of a type of pyarrow hold bytes."""
    import pyarrow.types

    if pyarrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image_type(kind.field("bytes").type)
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return str(kind) in ("binary", "large_binary", "binary_view")


def _image_columns(schema: Any) -> list[str]:
    return [field.name for field in schema if _is_image_type(field.type)]


def _only_image_column(path: str, schema: Any) -> tuple[str, ...]:
    names = _image_columns(schema)
    if not names:
        others = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(f"{path}: has no image column (bytes, or a struct with bytes); its columns are {others}")
    if len(names) > 1:
        raise UserError(f"{path}: has {len(names)} image columns: choose with --columns of {', '.join(names)}")
    return (names[0],)


def _check_image_column(path: str, schema: Any, column: str) -> None:
    if column not in _image_columns(schema):
        others = ", ".join(_image_columns(schema)) or "none"
        problem = f"is {schema.field(column).type}, not bytes" if column in schema.names else "does not exist"
        raise UserError(f"{path}: --columns: {column} {problem}; its image columns are {others}")


def _row_names(path: str, column: str) -> Iterator[str]:
    """Yields the name of each row, from the paths of a column; empty: a row has none."""
    with names_file(path):
        for paths in open_table(path).paths(column):
            yield from (_row_name(name) if name else "" for name in paths)


def _row_name(path: str) -> str:
    """Returns the path of a cell as that of a file in a folder. An absolute one is that of another machine."""
    return os.path.basename(path) if path.startswith("/") else folders.plain_path(path)


def _check_names(tables: list[_Table], report: Report) -> tuple[list[_Table], bool]:
    """Returns the usable tables, and whether their names name the rows: each row has one, and no two share a stem.

    Reports a table whose names cannot be read. Takes 9 bytes of memory a row.
    """
    for _, path, _, columns, _ in tables:
        kind = open_table(path).schema.field(columns[0]).type
        if not (hasattr(kind, "get_field_index") and kind.get_field_index("path") >= 0):
            return tables, False
    usable, count, hashes_n = [], 0, np.zeros(sum(size for *_, size in tables), np.uint64)
    for table in tables:
        _, path, _, columns, _ = table
        try:
            for row, name in enumerate(_row_names(path, columns[0]), count):
                if not name:
                    return tables, False
                stem = os.path.splitext(name)[0]
                hashes_n[row] = int.from_bytes(hashlib.blake2b(stem.encode(), digest_size=8).digest(), "little")
        except UnavailableError:
            raise
        except UserError as error:
            report(path, str(error))
        else:
            usable.append(table)
            count += table[-1]
    hashes_n = hashes_n[:count]
    hashes_n.sort()
    return usable, not (hashes_n[1:] == hashes_n[:-1]).any()
