"""Tables of images: parquet files, and the arrow files that `datasets.Dataset.save_to_disk` writes. Needs pyarrow.

A cell of an image column holds the bytes of an image file, or the struct {bytes, path} of Hugging Face. The rows of a
source count through all its files. The `path` of the first column's cells names the rows, as files in a folder, if each
row has one and their stems differ; otherwise the row numbers do. If a file cannot be read, the rows of each file count
by themselves, so that the numbers of the next files do not shift.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from EasyLM.errors import UnavailableError, UserError, check_installed
from EasyLM.storage import file_version, is_remote, open_binary
from tokenizer.media import folders
from tokenizer.media.folders import Report
from tokenizer.sources.items import Item

_NAMES_AT_A_TIME = 4096  # rows
# Columns of row groups that stay in memory, of all files together. A row group can have hundreds of megabytes.
_CACHED_CHUNKS = 4
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


def read_cell(path: str, member: str) -> bytes:
    """Reads a cell, by `ROW.COLUMN`.

    Raises:
      UserError: naming the cell, if it does not exist or has no bytes.
    """
    row, _, column = member.partition(".")
    table = open_table(path)
    if not row.isdigit() or int(row) >= table.num_rows or column not in table.schema.names:
        raise UserError(f"{path}!{member}: no such cell; the file has {table.num_rows} rows")
    with _names_file(path):
        cell = table.cell(int(row), column).as_py()
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if data is None:
        file = isinstance(cell, dict) and cell.get("path")
        raise UserError(f"{path}!{member}: has no bytes" + (f", only the path {file}" if file else ""))
    return data


def read_values(path: str, row: int, columns: tuple[str, ...]) -> dict[str, Any]:
    """Reads the values of a row; columns that the file does not have are left out.

    Raises:
      UserError: naming the file, if it cannot be read.
    """
    table = open_table(path)
    with _names_file(path):
        return table.values(row, tuple(name for name in columns if name in table.schema.names))


class _Parquet:
    """A parquet file. Reading a cell reads its column of its row group."""

    def __init__(self, path: str, version: str):
        import pyarrow.parquet

        self._key = path, version
        file = open_binary(path) if is_remote(path) else path
        self._file = pyarrow.parquet.ParquetFile(file)
        metadata = self._file.metadata
        self.schema, self.num_rows = self._file.schema_arrow, metadata.num_rows
        self._starts = np.cumsum([0] + [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])

    def cell(self, row: int, column: str) -> Any:
        """Returns a cell as a scalar of pyarrow."""
        group, row = self._row_group_of(row)
        return _read_chunk(*self._key, group, (column,))[column][row]

    def values(self, row: int, columns: tuple[str, ...]) -> dict[str, Any]:
        """Returns the values of a row."""
        group, row = self._row_group_of(row)
        return _read_chunk(*self._key, group, columns).slice(row, 1).to_pylist()[0] if columns else {}

    def _row_group_of(self, row: int) -> tuple[int, int]:
        """Returns the row group of a row, and its number there."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        return group, row - int(self._starts[group])

    def read_chunk(self, group: int, columns: tuple[str, ...]) -> Any:
        """Reads columns of a row group."""
        return self._file.read_row_group(group, columns=list(columns))

    def paths(self, column: str) -> Iterator[list[str | None]]:
        """Yields the paths of a column of structs."""
        for batch in self._file.iter_batches(_NAMES_AT_A_TIME, columns=[f"{column}.path"]):
            yield batch.column(0).field("path").to_pylist()


class _Arrow:
    """A local arrow file in the streaming format, mapped into memory."""

    def __init__(self, path: str):
        import pyarrow

        self._table = pyarrow.ipc.open_stream(pyarrow.memory_map(path)).read_all()
        self.schema, self.num_rows = self._table.schema, self._table.num_rows
        self._checked: set[str] = set()  # columns

    def _column(self, name: str) -> Any:
        """Returns a column. A damaged one would end the process: Arrow trusts the offsets in a file."""
        column = self._table[name]
        if name not in self._checked:
            column.validate(full=True)
            self._checked.add(name)
        return column

    def cell(self, row: int, column: str) -> Any:
        """Returns a cell as a scalar of pyarrow."""
        return self._column(column)[row]

    def values(self, row: int, columns: tuple[str, ...]) -> dict[str, Any]:
        """Returns the values of a row."""
        return {column: self.cell(row, column).as_py() for column in columns}

    def paths(self, column: str) -> Iterator[list[str | None]]:
        """Yields the paths of a column of structs."""
        for chunk in self._column(column).chunks:
            yield chunk.field("path").to_pylist()


def open_table(path: str) -> _Parquet | _Arrow:
    """Opens a file. The last files stay open until they change.

    Raises:
      UserError: naming the file, if it is missing or damaged, or pyarrow is not installed.
    """
    check_installed(path, "parquet", "pyarrow")
    return _open_table(path, str(file_version(path)))


@functools.lru_cache(4)
def _open_table(path: str, version: str) -> _Parquet | _Arrow:
    with _names_file(path):
        is_arrow = path.endswith(".arrow")
        table = _Arrow(path) if is_arrow else _Parquet(path, version)
        str(table.schema.names)  # fails if a name is not UTF-8
        return table


@functools.lru_cache(_CACHED_CHUNKS)
def _read_chunk(path: str, version: str, group: int, columns: tuple[str, ...]) -> Any:
    return _open_table(path, version).read_chunk(group, columns)  # type: ignore[union-attr]  # is a parquet file


@contextlib.contextmanager
def _names_file(path: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of pyarrow, and of the packages of remote file systems
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason})") from error


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
    with _names_file(path):
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
