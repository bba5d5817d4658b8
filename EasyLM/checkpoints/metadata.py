"""Sidecar files of a checkpoint: `metadata.json` describes the run; `dataset.json` holds its position in the data.

Each contains a digest of its values, which is verified when the file is read. Files without it, such as those of the
LVM release, are read without verification.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from typing import Any

from EasyLM.checkpoints import restricted_pickle
from EasyLM.errors import UserError, prefix_errors
from EasyLM.storage import MOST_BYTES, check_schema, open_binary, parse_json

_METADATA = {
    "step?": int,
    "updates?": int,
    "flags?": {"load_checkpoint?": str, "optimizer?": {"accumulate_gradient_steps?": int}},
    "llama_config?": dict,
    "vqgan_config?": dict,
    "started_from?": [str],
    "save?": {"run_directory?": str, "number?": int, "milestone?": bool, "files?": {str: int}},
}
_DATASET_STATE = {
    "rows_consumed?": int,
    "source?": {"seq_length?": int},
    "total_tokens?": int,
    "config?": {"tokens_count_at_start?": int},
}

_COUNTS = {"step": 2**31, "updates": 2**31, "rows_consumed": 2**63, "total_tokens": 2**63}  # exclusive limits

_PICKLE = b"\x80"  # the first byte of all pickles since Python 3
_DIGEST, _DIGEST_BYTES = "digest", 8


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a sidecar, as JSON values, with its digest."""
    values = json.loads(json.dumps(content))
    return {**values, _DIGEST: _digest(values)}


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def load_metadata(path: str) -> dict:
    """Reads the metadata of a run from JSON or from a pickle of the LVM release. No code in the pickle is executed.

    Raises:
      UserError: if the file has neither format, its values differ from those that were saved, a value has another type
        than in the files of a run, or the pickle refers to anything other than settings.
    """
    return _load(path, _METADATA)


def load_dataset_state(path: str) -> dict:
    """Reads the data state of a run. It has the same two formats, and raises the same errors."""
    state = _load(path, _DATASET_STATE)
    with prefix_errors(path):
        if "rows_consumed" in state and "source" not in state:
            raise UserError("lacks the key 'source', which describes the data")
        length = state.get("source", {}).get("seq_length", 1)
        if length < 1:
            raise UserError(f"source.seq_length={length}: must be at least 1")
        total, start = state.get("total_tokens", 0), state.get("config", {}).get("tokens_count_at_start", 0)
        if not 0 <= start <= total:
            raise UserError(f"config.tokens_count_at_start={start}: must be 0..{total}, the total_tokens")
    return state


def _load(path: str, schema: Mapping[str, Any]) -> dict:
    with contextlib.closing(open_binary(path)) as file:
        data = file.read(MOST_BYTES + 1)
    with prefix_errors(path):
        is_pickle = data[:1] == _PICKLE or path.endswith(".pkl")
        content = restricted_pickle.loads(data) if is_pickle else parse_json(data)
        check_schema(content, schema)
        _check_key_of_digest(content)
        if _DIGEST in content and content.pop(_DIGEST) != _digest(content):
            raise UserError(f"its values are not those that were saved (after an edit, delete the key {_DIGEST!r})")
        for name, limit in _COUNTS.items():
            if f"{name}?" in schema and not 0 <= content.get(name, 0) < limit:
                raise UserError(f"{name}={content[name]}: must be 0..{limit - 1}")
    return content


def _check_key_of_digest(content: dict[str, Any]) -> None:
    """Raises UserError if the digest is under a damaged key: it would count as missing. It is the last value."""
    key, value = next(reversed(content.items()), (_DIGEST, None))
    is_digest = isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{2 * _DIGEST_BYTES}}}", value)
    if is_digest and key not in (_DIGEST, "tokenizer"):  # the name of a tokenizer is a digest, too
        raise UserError(f"ends with a digest under the key {key!r} instead of {_DIGEST!r}")


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
