"""The facts beside a checkpoint: what the run was, and where its data stood."""

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping

from EasyLM.checkpoints import msgpack_arrays, restricted_pickle
from EasyLM.errors import UserError


def load_metadata(path: str) -> dict:
    """The metadata of a run: JSON, or a pickle of a run of the LVM release, read without running anything.

    Raises:
      UserError: if the file is neither, or its pickle names anything but settings.
    """
    with msgpack_arrays.open_binary(path, "rb") as file:
        data = file.read()
    if data[:1] != b"{":
        return restricted_pickle.loads(data, path)
    try:
        return json.loads(data)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None


load_dataset_state = load_metadata  # the same two formats


def make_metadata(step: int, flags: Mapping, **facts) -> dict:
    """What is saved beside a checkpoint: step, flags, the caller's facts (model, mesh), versions, git revision."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    versions["python"] = platform.python_version()
    return {"step": step, "flags": dict(flags), **facts, "versions": versions, "git_revision": _git_revision()}


@functools.cache
def _git_revision() -> str | None:
    """The commit of this code, with `+changes` if files differ from it; None outside a git checkout."""
    git = ["git", "-C", os.path.dirname(__file__)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changed else head
