"""The files of tables: parquet files, and the arrow files that `datasets.Dataset.save_to_disk` writes. Needs pyarrow.

A cell of an image column holds the bytes of an image file, or the struct {bytes, path} of Hugging Face.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from EasyLM.errors import UserError, check_installed
from EasyLM.storage import file_version, is_remote, open_binary

_NAMES_AT_A_TIME = 4096  # rows
# Columns of row groups that stay in memory, of all files together. A row group can have hundreds of megabytes.
_CACHED_CHUNKS = 4


def read_cell(path: str, member: str) -> bytes:
    """Reads a cell, by `ROW.COLUMN`.

    Raises:
      UserError: naming the cell, if it does not exist or has no bytes.
    """
    row, _, column = member.partition(".")
    table = open_table(path)
    if not row.isdigit() or int(row) >= table.num_rows or column not in table.schema.names:
        raise UserError(f"{path}!{member}: no such cell; the file has {table.num_rows} rows")
    with names_file(path):
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
    with names_file(path):
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
    with names_file(path):
        is_arrow = path.endswith(".arrow")
        table = _Arrow(path) if is_arrow else _Parquet(path, version)
        str(table.schema.names)  # fails if a name is not UTF-8
        return table


@functools.lru_cache(_CACHED_CHUNKS)
def _read_chunk(path: str, version: str, group: int, columns: tuple[str, ...]) -> Any:
    return _open_table(path, version).read_chunk(group, columns)  # type: ignore[union-attr]  # is a parquet file


@contextlib.contextmanager
def names_file(path: str) -> Iterator[None]:
    """Raises errors as a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of pyarrow, and of the packages of remote file systems
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason})") from error
