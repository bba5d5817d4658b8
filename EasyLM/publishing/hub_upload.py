"""Uploads a model or a tokenizer to a repository of the Hugging Face Hub.

The token is that of huggingface_hub: HF_TOKEN, or the one that `hf auth login` has stored.
"""

import contextlib
import os
import re
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
}


def prepare_repository(name: str) -> None:
    """Creates a repository of models if it does not exist. Call it before the output is computed.

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
        files = sorted(set(api.list_repo_files(name)) - _OF_THE_HUB)
    if files:
        raise UserError(f"the repository holds {', '.join(files[:3])}: name a new or empty one")


def upload_files(name: str, directory: str, files: Collection[str]) -> str:
    """Uploads files of a directory to a repository of `prepare_repository`, in one commit. Returns its address.

    Raises:
      UserError: if it fails. The repository is then as before.
    """
    import huggingface_hub

    additions = [huggingface_hub.CommitOperationAdd(file, os.path.join(directory, file)) for file in sorted(files)]
    with _one_line(f"; {directory} is complete: `hf upload {name} {directory}` uploads it"):
        return str(huggingface_hub.HfApi().create_commit(name, additions, commit_message="Upload").repo_url)


@contextlib.contextmanager
def _one_line(advice: str = "") -> Iterator[None]:
    """Turns errors of huggingface_hub into a UserError that names the remedy."""
    try:
        yield
    except Exception as error:  # its own errors, those of the HTTP client, refused metadata
        status = getattr(getattr(error, "response", None), "status_code", 0)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{_REMEDIES.get(status, reason)}{advice}") from error
