"""Examples that hold text: lines of local or remote files, or a Hugging Face dataset."""

import glob
import itertools
import os
from collections.abc import Iterator

from EasyLM.errors import UserError
from EasyLM.storage import check_line_start, content_digest, file_version, is_compressed, json_digest, open_binary


class FileExamples:
    """The lines of files: JSON objects, or of .txt files records {"text": line}. Blank lines are left out.

    Iterating yields (number, offset, item): what `address` understands, the first byte counted over all files, and a
    JSON line (bytes) or an example (dict).
    """

    total = None  # number of examples; unknown

    def __init__(self, paths: list[str]):
        self._paths = paths
        self.source = paths[0]
        self.name = os.path.basename(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")

    def version(self) -> dict:
        """Equal as long as the files are the same."""
        return {"files": json_digest([[os.path.abspath(path), file_version(path)] for path in self._paths])}

    def identity(self) -> list:
        """What is in the files, as JSON values, wherever they lie."""
        sizes = [file_version(path)["size"] for path in self._paths]
        return [[size, content_digest(path, size)] for path, size in zip(self._paths, sizes, strict=True)]

    def address(self, number: tuple[int, int]) -> str:
        file, line = number
        return f"{self._paths[file]}:{line}"

    def check_line_begins(self, offset: int) -> None:
        """UserError unless a line of the first file begins at that byte."""
        check_line_start(self._paths[0], offset)

    def __iter__(self) -> Iterator:
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
    """The examples of a `datasets` dataset. Iterating yields as `FileExamples` does; offset is the example's number."""

    def __init__(self, dataset, name: str, source: str):
        self._dataset, self.name, self.source = dataset, name, source
        self.total = len(dataset) if hasattr(dataset, "__len__") else None

    def version(self) -> dict:
        return {"fingerprint": getattr(self._dataset, "_fingerprint", None)}  # a streamed dataset has none

    def identity(self) -> dict:
        return {"name": self.name, **self.version()}

    def address(self, number: int) -> str:
        return f"{self.name}, example {number}"

    def __iter__(self) -> Iterator:
        for number, example in enumerate(self._dataset):
            yield number, number, example


def huggingface_examples(config, name: str):
    """The examples of a `huggingface_dataset` config; `name` is how messages call its flags.

    Raises:
      UserError: naming the flag, if there is no such dataset or split, or the package `datasets` is missing.
    """
    path = config.path.rstrip("/")
    if os.path.isfile(path):
        if is_compressed(path):
            raise UserError(
                f"--{name}.path={path}: is compressed, which cannot be read from a line on: unpack it first"
            )
        return FileExamples([path])
    saved = [file for file in ("dataset_dict.json", "state.json") if os.path.isfile(os.path.join(path, file))]
    if os.path.isdir(path) and not saved:
        found = sorted(itertools.chain(*(glob.glob(f"{glob.escape(path)}/*{end}") for end in (".jsonl", ".txt"))))
        if not found:
            raise UserError(f"--{name}.path={path}: holds no saved dataset, and no .jsonl or .txt file")
        return FileExamples(found)
    if os.path.isabs(path) and not saved:
        raise UserError(f"--{name}.path={path}: no such file or directory")
    try:
        import datasets

        if saved:
            dataset = datasets.load_from_disk(path)
            if isinstance(dataset, dict):
                if config.split not in dataset:
                    raise UserError(f"--{name}.split={config.split!r}: choose one of {', '.join(map(repr, dataset))}")
                dataset = dataset[config.split]
        else:
            dataset = datasets.load_dataset(path, config.name or None, split=config.split, streaming=config.streaming)
    except ImportError as error:
        raise UserError(f"--{name}: needs the package {error.name}: pip install -e '.[text]'") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"--{name}.path={path}: cannot load it ({str(error).splitlines()[0]})") from None
    address = path if saved else f"hub://{path}/{config.name}"
    return DatasetExamples(dataset, f"{path}[{config.split}]", f"{address}/{config.split}")
