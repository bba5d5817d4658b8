"""The open files of this process."""

import contextlib
import os


def open_files(folder) -> list[str]:
    """Returns the paths of the open files under a folder, deleted ones too."""
    paths = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of this listing
            paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [path for path in paths if path.startswith(f"{folder}/")]
