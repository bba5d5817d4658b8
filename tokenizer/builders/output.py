"""The output file of a build, local or remote."""

from collections.abc import Mapping
from typing import Any, Protocol

from EasyLM.storage import is_remote
from tokenizer.builders.resumable_file import ResumableFile
from tokenizer.builders.uploaded_file import UploadedFile


class OutputFile(Protocol):
    """What `ResumableFile` and `UploadedFile` have in common: see there.

    Attributes:
      path: of the file.
      scratch_folder: a local folder for temporary files of its size.
      finished_report: the report, if the file is finished.
      state: where to resume; None: at the start.
    """

    path: str
    finished_report: dict[str, Any] | None
    state: dict[str, Any] | None

    @property
    def scratch_folder(self) -> str:
        """A local folder for temporary files."""
        ...

    def claim(self) -> None:
        """Locks the file."""
        ...

    def write(self, data: bytes) -> None:
        """Appends data."""
        ...

    def save_is_due(self) -> bool:
        """Returns whether it is time to call `save`."""
        ...

    def save(self, state: Mapping[str, Any]) -> None:
        """Saves the progress."""
        ...

    def finish(self, report: Mapping[str, Any]) -> None:
        """Completes the file."""
        ...

    def close(self) -> None:
        """Unlocks the file."""
        ...


def open_output(path: str, fingerprint: Mapping[str, Any], fresh: bool) -> OutputFile:
    """Returns the file; see the constructors of `ResumableFile` and `UploadedFile`."""
    return (UploadedFile if is_remote(path) else ResumableFile)(path, fingerprint, fresh)
