"""What lies in a directory of a run, local or remote: kinds of entries, links, sizes of files."""

import contextlib
import os

from EasyLM.checkpoints.layout import CHECKPOINTS, LATEST, ORBAX_STATES
from EasyLM.storage import is_remote, names_store_errors, remote_file_system, walk_remote


def list_directory(path: str) -> dict[str, str]:
    """Returns the kinds of a directory's entries by name.

    The kinds: "file", "directory", "link" to a file or directory inside a run directory, or "dangling" for a link whose
    target does not exist. A link that leads elsewhere counts as its target. A missing directory is empty.

    Raises:
      OSError: if a local directory cannot be read.
      UnavailableError: if an object store cannot be reached.
    """
    if is_remote(path):
        system, inner = remote_file_system(path)
        system.invalidate_cache()
        try:
            with names_store_errors(path):
                details = system.ls(inner, detail=True)
        except FileNotFoundError:
            return {}
        return {os.path.basename(entry["name"].rstrip("/")): entry["type"] for entry in details}
    try:
        with os.scandir(path) as entries:
            return {entry.name: _kind(entry) for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def is_own_link(path: str) -> bool:
    """Whether a path in a run directory is a link as a save makes it: to `latest`, or into the step directories."""
    if not os.path.islink(path):
        return False
    directory = os.path.dirname(os.path.abspath(path))
    target = os.path.relpath(os.path.join(directory, os.readlink(path)), directory)
    return target.split(os.sep)[0] in (LATEST, CHECKPOINTS)


def file_sizes(directory: str) -> dict[str, int]:
    """Returns the bytes of all files below a local or remote directory, by their paths in it.

    Raises:
      UnavailableError: if an object store cannot be reached.
    """
    if is_remote(directory):
        remote_file_system(directory)[0].invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            return {path: info["size"] for path, info in walk_remote(directory)}
        return {}
    return {
        os.path.relpath(path, directory): os.path.getsize(path)
        for folder, _, names in os.walk(directory)
        for path in (os.path.join(folder, name) for name in names)
    }


def orbax_record(directory: str) -> dict[str, dict[str, int]]:
    """Returns what the metadata of a checkpoint records about its Orbax state, if any: the bytes of each file."""
    for name in list_directory(directory):
        if name in ORBAX_STATES:
            return {"files": file_sizes(f"{directory}/{name}")}
    return {}


def _kind(entry: os.DirEntry) -> str:
    if entry.is_symlink() and not os.path.exists(entry.path):
        return "dangling"
    if is_own_link(entry.path):
        return "link"
    return "directory" if entry.is_dir() else "file"
