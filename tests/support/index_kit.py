"""File indexes of names without files."""

import dataclasses

from EasyLM.skipped_inputs import SkippedInputs
from tokenizer.builders.file_index import FileIndex
from tokenizer.sources.items import Item


@dataclasses.dataclass(frozen=True)
class Names:
    """A source of files that do not exist."""

    directory: str
    names: list[str]
    columns: tuple[str, ...] = ("",)

    @property
    def flag(self) -> str:
        return f"--input_dir={self.directory}"

    def items(self, ignored, report):
        return (Item(name, 0, f"{self.directory}/{name}", "", "1 2") for name in self.names)


def make_index(names, layout, count=1):
    """Returns the index of file names (one list per input folder) and its skipped inputs."""
    names_by_folder = [names] * count if isinstance(names[0], str) else names
    skipped = SkippedInputs(99)
    sources = [Names(str(i), folder) for i, folder in enumerate(names_by_folder)]
    return FileIndex(layout, sources, skipped), skipped
