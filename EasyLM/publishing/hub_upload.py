"""Uploads a model or a tokenizer to a repository of the Hugging Face Hub.

The token is that of huggingface_hub: HF_TOKEN, or the one that `hf auth login` has stored.
"""

import contextlib
import os
import re
import shlex
from collections.abc import Collection, Iterator

from EasyLM.errors import UserError
from EasyLM.flags import Flag

PUSH_FLAG = Flag(
    "", "OWNER/NAME of a new or empty repository on the Hugging Face Hub, to which the output is uploaded; empty: none."
)
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_OF_THE_HUB = {".gitattributes"}  # in each new repository
_REMEDIES = {
    401: "there is no valid token: set HF_TOKEN to one that may write, or run `hf auth login`",
    403: "the token may not write there: it needs the permission to write, and membership of the owner",
    412: "someone else has written to the repository since this command began: look at it first",
}


def prepare_repository(name: str) -> str | None:
    """Creates a repository of models if it does not exist. Call it before the output is computed.

    Returns:
      The repository's newest commit, of which nothing needs to be kept.

    Raises:
      UserError: if the name is malformed, the token may not create the repository, or the repository holds files, which
        an upload could replace.
    """
    if not _REPOSITORY.fullmatch(name):
        raise UserError("must be OWNER/NAME")
    import huggingface_hub  # here, because importing it takes a quarter of a second

    with _one_line():
        api = huggingface_hub.HfApi()
        api.create_repo(name, exist_ok=True)
        commit = api.model_info(name).sha
        files = sorted(set(api.list_repo_files(name, revision=commit)) - _OF_THE_HUB)
    if files:
        raise UserError(f"the repository holds {', '.join(files[:3])}: name a new or empty one")
    return commit


def upload_files(name: str, directory: str, files: Collection[str], parent: str | None) -> str:
    """Uploads files of a directory to a repository, in one commit. Returns the repository's address.

    Args:
      parent: what `prepare_repository` returned. If there is a newer commit, the upload fails.

    Raises:
      UserError: if it fails. The repository is then as before. The message has the command that uploads these files.
    """
    import huggingface_hub

    names = sorted(files)
    additions = [huggingface_hub.CommitOperationAdd(file, os.path.join(directory, file)) for file in names]
    command = shlex.join(["hf", "upload", name, directory, ".", *(f"--include={file}" for file in names)])
    with _one_line(f"; {directory} is complete: `{command}` uploads it"):
        commit = huggingface_hub.HfApi().create_commit(name, additions, commit_message="Upload", parent_commit=parent)
    return str(commit.repo_url)


@contextlib.contextmanager
def _one_line(advice: str = "") -> Iterator[None]:
    """Turns errors of huggingface_hub into a UserError that names the remedy."""
    try:
        yield
    except Exception as error:  # its own errors, those of the HTTP client, refused metadata
        status = getattr(getattr(error, "response", None), "status_code", 0)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{_REMEDIES.get(status, reason)}{advice}") from error
