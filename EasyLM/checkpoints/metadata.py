"""Sidecar files of a checkpoint: `metadata.json` describes the run; `dataset.json` holds its position in the data."""

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

from EasyLM.checkpoints import restricted_pickle
from EasyLM.errors import UserError
from EasyLM.storage import open_binary


def load_metadata(path: str) -> dict:
    """Reads the metadata of a run from JSON or from a pickle of the LVM release. No code in the pickle is executed.

    Raises:
      UserError: if the file has neither format, or the pickle refers to anything other than settings.
    """
    with contextlib.closing(open_binary(path)) as file:
        data = file.read()
    if data[:1] != b"{":
        content = restricted_pickle.loads(data, path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: holds no settings, but a {type(content).__name__}")
        return content
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


load_dataset_state = load_metadata  # the dataset state has the same two formats


def make_metadata(step: int, flags: Mapping, **sections: Any) -> dict:
    """Returns the metadata of a checkpoint: step, flags, `sections` (model, mesh), versions and git revision."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    versions["python"] = platform.python_version()
    return {"step": step, "flags": dict(flags), **sections, "versions": versions, "git_revision": _git_revision()}


@functools.cache
def _git_revision() -> str | None:
    """Returns the git commit, with `+changes` if the working tree is modified. Returns None outside a git checkout."""
    git = ["git", "-C", os.path.dirname(__file__)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changed else head
