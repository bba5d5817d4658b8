"""The cache of huggingface_hub, laid out on this machine as a download leaves it."""

import hashlib
import os
import pathlib
from collections.abc import Mapping

import pytest
from huggingface_hub import constants


def offline_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Returns an empty cache, which huggingface_hub uses in this process without a network. Goes to `tmp_path`."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def cache_repository(
    cache: pathlib.Path, name: str, files: Mapping[str, bytes] | pathlib.Path, revision: str = "main"
) -> pathlib.Path:
    """Puts a revision of a repository into a cache: blobs, named by their content, and a snapshot of links to them.

    Args:
      files: the content by path in the repository, or a folder.

    Returns:
      The snapshot.
    """
    if isinstance(files, pathlib.Path):
        files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
    directory = cache / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(f"{name} {revision}".encode()).hexdigest()
    reference = directory / "refs" / revision
    for folder in (directory / "blobs", reference.parent):
        folder.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    for path, data in files.items():
        blob = directory / "blobs" / hashlib.sha1(data).hexdigest()
        blob.write_bytes(data)
        link = directory / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return directory / "snapshots" / commit
