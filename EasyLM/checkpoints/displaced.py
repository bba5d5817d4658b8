"""Checkpoints that lie in a local run directory where a save makes its links.

Such files come from the LVM release, which has no links, or from a copy that replaced the links by files (`cp -rL`,
rsync, a download). A file with its sidecars moves into a step directory. A file without them is never touched.
"""

import os

from EasyLM.checkpoints.directories import is_own_link
from EasyLM.checkpoints.layout import LATEST, LINKS
from EasyLM.checkpoints.listing import read_latest_file
from EasyLM.checkpoints.metadata import load_metadata
from EasyLM.errors import UserError


def check_replaceable(run_dir: str) -> None:
    """Checks that a save has to replace nothing but its own links and known checkpoints.

    Raises:
      UserError: naming a foreign file.
    """
    for name in (LATEST, *LINKS):
        path = os.path.join(run_dir, name)
        is_name = name == LATEST and os.path.isfile(path) and read_latest_file(path)  # from a place without links
        if is_occupied(run_dir, name, "") and not is_name and step_of(run_dir, name, "") is None:
            raise UserError(
                f"{path}: does not belong to a complete checkpoint, and the first save would have to replace it; "
                "move it away"
            )


def is_occupied(run_dir: str, name: str, suffix: str) -> bool:
    """Whether something that is not a link of a save has the name of one."""
    path = _with_suffix(run_dir, name, suffix)
    return os.path.lexists(path) and not is_own_link(path)


def step_of(run_dir: str, name: str, suffix: str) -> int | None:
    """Returns the step of the checkpoint to which a file belongs; None if it belongs to none.

    The metadata with the same suffix decides; for `latest`, the metadata in this directory.
    """
    directory = os.path.join(run_dir, LATEST) if name == LATEST else run_dir
    for ending in (".json", ".pkl"):
        path = os.path.join(directory, f"metadata{suffix}{ending}")
        if os.path.isfile(path) and not is_own_link(path):
            try:
                step = load_metadata(path).get("step")
            except UserError:
                continue
            if isinstance(step, int):
                return step
    return None


def move(run_dir: str, name: str, suffix: str, target: str) -> None:
    """Moves the directory `latest`, or a file and its sidecars, to the new directory `target`, without the suffix."""
    if name == LATEST:
        os.rename(os.path.join(run_dir, name), target)
        return
    os.mkdir(target)
    stems = [os.path.splitext(link)[0] for link in LINKS]
    for stem, ending in [(stem, ending) for stem in stems for ending in ("", ".json", ".pkl")]:
        if is_occupied(run_dir, stem + ending, suffix):
            _move_file(_with_suffix(run_dir, stem + ending, suffix), os.path.join(target, stem + ending))


def _with_suffix(run_dir: str, name: str, suffix: str) -> str:
    stem, ending = os.path.splitext(name)
    return os.path.join(run_dir, f"{stem}{suffix}{ending}")


def _move_file(path: str, target: str) -> None:
    """Renames a file. A link is replaced by one to its absolute target: a relative one may depend on its place."""
    if os.path.islink(path):
        os.symlink(os.path.realpath(path), target)
        os.remove(path)
    else:
        os.rename(path, target)
