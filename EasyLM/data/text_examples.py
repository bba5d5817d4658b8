"""Examples that hold text: lines of local or remote files, or a Hugging Face dataset."""

import glob
import itertools
import os
from collections.abc import Iterator
from typing import Any

from EasyLM.data.protocols import Examples
from EasyLM.errors import UserError
from EasyLM.storage import (
    absolute_path,
    check_line_start,
    content_digest,
    file_version,
    is_compressed,
    json_digest,
    open_binary,
)


class FileExamples:
    """The lines of files as `protocols.Examples`: JSON objects, or for .txt files records {"text": line}.

    Blank lines are skipped. Offsets count bytes over all files. The number of an example is (file, line).
    """

    total: int | None = None

    def __init__(self, paths: list[str]):
        self._paths = paths
        self.source = paths[0]
        self.name = os.path.basename(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")

    def version(self) -> dict[str, Any]:
        """See `Examples`."""
        return {"files": json_digest([[absolute_path(path), file_version(path)] for path in self._paths])}

    def fingerprint(self) -> list[list]:
        """See `Examples`: size and content digest of each file."""
        sizes = [file_version(path)["size"] for path in self._paths]
        return [[size, content_digest(path, size)] for path, size in zip(self._paths, sizes, strict=True)]

    def address(self, number: tuple[int, int]) -> str:
        """See `Examples`."""
        file, line = number
        return f"{self._paths[file]}:{line}"

    def check_line_start(self, offset: int) -> None:
        """See `Examples`."""
        check_line_start(self._paths[0], offset)

    def __iter__(self) -> Iterator[tuple[tuple[int, int], int, bytes | dict[str, str]]]:
        """See `Examples`."""
        offset = 0
        for file, path in enumerate(self._paths):
            with open_binary(path) as lines:
                for line, data in enumerate(lines, start=1):
                    if data.strip():
                        yield (file, line), offset, _text(path, line, data) if path.endswith(".txt") else data
                    offset += len(data)


def _text(path: str, line: int, data: bytes) -> dict[str, str]:
    try:
        return {"text": data.decode().rstrip("\r\n")}
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{line}: not UTF-8 text ({error})") from None


class DatasetExamples:
    """The examples of a `datasets` dataset as `protocols.Examples`. The offset of an example is its number."""

    def __init__(self, dataset: Any, name: str, source: str):
        self._dataset, self.name, self.source = dataset, name, source
        self.total = len(dataset) if hasattr(dataset, "__len__") else None

    def version(self) -> dict[str, Any]:
        """See `Examples`."""
        return {"fingerprint": getattr(self._dataset, "_fingerprint", None)}  # a streamed dataset has none

    def fingerprint(self) -> dict[str, Any]:
        """See `Examples`."""
        return {"name": self.name, **self.version()}

    def address(self, number: int) -> str:
        """See `Examples`."""
        return f"{self.name}, example {number}"

    def check_line_start(self, offset: int) -> None:
        """See `Examples`: a dataset has no lines, so only offset 0 is valid."""
        if offset:
            raise UserError(f"no line of {self.name} starts at byte {offset}")

    def __iter__(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """See `Examples`."""
        for number, example in enumerate(self._dataset):
            yield number, number, example


def huggingface_examples(path: str, name: str, split: str, streaming: bool) -> Examples:
    """Returns the examples of a dataset.

    Args:
      path: a dataset of the Hub, a `save_to_disk` directory, or .jsonl or .txt files or their directory.
      name: configuration of a dataset of the Hub.
      split: split of a dataset of the Hub or of a saved dataset.
      streaming: read a dataset of the Hub while downloading it.

    Raises:
      UserError: naming the argument, if there is no such dataset or split, or the package `datasets` is not installed.
    """
    path = path.rstrip("/")
    if os.path.isfile(path):
        if is_compressed(path):
            raise UserError(f"path={path}: is compressed; decompress it first")
        return FileExamples([path])
    saved = any(os.path.isfile(os.path.join(path, file)) for file in ("dataset_dict.json", "state.json"))
    if os.path.isdir(path) and not saved:
        paths = sorted(itertools.chain(*(glob.glob(f"{glob.escape(path)}/*{end}") for end in (".jsonl", ".txt"))))
        if not paths:
            raise UserError(f"path={path}: holds no saved dataset, and no .jsonl or .txt file")
        return FileExamples(paths)
    if os.path.isabs(path) and not saved:
        raise UserError(f"path={path}: no such file or directory")
    try:
        dataset = _load_saved(path, split) if saved else _load_from_hub(path, name, split, streaming)
    except ImportError as error:
        raise UserError(f"path={path}: needs the package {error.name}: pip install -e '.[text]'") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"path={path}: cannot be loaded ({str(error).splitlines()[0]})") from None
    address = path if saved else f"hub://{path}/{name}"
    return DatasetExamples(dataset, f"{path}[{split}]", f"{address}/{split}")


def _load_saved(path: str, split: str) -> Any:
    import datasets

    dataset = datasets.load_from_disk(path)
    if not isinstance(dataset, dict):
        return dataset
    if split not in dataset:
        raise UserError(f"split={split!r}: choose one of {', '.join(map(repr, dataset))}")
    return dataset[split]


def _load_from_hub(path: str, name: str, split: str, streaming: bool) -> Any:
    import datasets

    return datasets.load_dataset(path, name or None, split=split, streaming=streaming)
