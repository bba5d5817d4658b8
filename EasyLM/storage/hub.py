"""Names on the Hugging Face Hub: `OWNER/NAME[@REVISION][/FOLDER]` in place of a local path.

huggingface_hub downloads to its cache (HF_HOME) and reads the cache alone if HF_HUB_OFFLINE=1.
"""

import os
import re

from EasyLM.errors import UserError
from EasyLM.storage.remote import is_remote

_NAME = re.compile(  # pull requests have revisions of several parts: refs/pr/1
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>refs/\w+/[^/@]+|[^/@]+))?(?:/(?P<inside>[^@]*))?"
)
_PAGE = re.compile(  # of a repository, or of a folder or a file in it
    r"(?:https?://)?(?:huggingface|hf)\.co/(?P<repository>[^/]+/[^/?#]+)"
    r"(?:/(?:tree|blob)/(?P<revision>[^/?#]+)(?P<inside>/[^?#]+)?)?/?"
)
_SETTINGS = ("*.json", "*.yaml", "*.yml", "README.md")  # README.md: the card
_PLACE = "on the Hugging Face Hub (without a network: in its cache, where a download may be incomplete)"
_OWN_PROTOCOL = "hf://"  # fsspec opens single files with it
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.ckpt")  # in order of preference: a repository may hold several forms


def is_hub_name(path: str) -> bool:
    """Whether a path has the form of a name on the Hub. A relative local path can have it too."""
    return _NAME.fullmatch(path) is not None


def split_revision(path: str) -> tuple[str, str | None]:
    """Returns the repository and the revision of `OWNER/NAME@REVISION`; a path that is something else, and None."""
    match = _NAME.fullmatch(path)
    if match is None or match["inside"] or os.path.exists(path):
        return path, None
    return match["repository"], match["revision"]


def local_path(path: str) -> str:
    """Returns the local path of a model or tokenizer that may be on the Hub.

    A path that exists, and one that cannot be the name of a repository, are returned as they are. Otherwise settings,
    the card and weights are downloaded: of a repository, of a folder in it, or one file.

    Raises:
      UserError: if the name is neither a local path nor available on the Hub or in the cache, or is the address of a
        page of the Hub.
    """
    if os.path.exists(path):
        return path
    if page := _PAGE.fullmatch(path):
        revision = f"@{page['revision']}" if page["revision"] else ""
        name = f"{page['repository']}{revision}{page['inside'] or ''}".rstrip("/")
        raise UserError(f"{path}: the address of a page of the Hugging Face Hub: give the name, {name}")
    match = _NAME.fullmatch(path)
    if match is None:
        return path
    repository, revision, inside = match["repository"], match["revision"], (match["inside"] or "").strip("/")
    outer = os.path.dirname(inside)
    beside = [os.path.join(outer, name) for name in _SETTINGS]
    files = [f"{inside}*", *beside] if inside else []
    advice = _how_to_download(repository, revision, files, os.path.join("DIR", inside).rstrip("/"))

    def download(folder: str, patterns: list[str]) -> str:
        return _download(path, repository, revision, folder, patterns, advice)

    if inside:  # a file, or a folder
        file = os.path.join(download(outer, [inside, *beside]), inside)
        if os.path.isfile(file):
            return file
    for weights in _WEIGHTS:
        patterns = [os.path.join(inside, name) for name in (*_SETTINGS, weights)]
        directory = os.path.normpath(os.path.join(download(inside, patterns), inside))
        if _holds(directory, weights):
            return directory
    what = f"{'a file or ' if inside else ''}a directory of {repository} with weights ({', '.join(_WEIGHTS)})"
    raise UserError(f"{path}: neither a local path, nor {what} {_PLACE}; {advice}")


def path_on_disk(path: str, what: str) -> str:
    """Returns the `local_path` of a directory whose reader needs a local disk.

    Args:
      what: what is read, for the error message.

    Raises:
      UserError: as `local_path`, or if the path is on an object store or on the web.
    """
    path = local_path(path)
    if not is_remote(path):
        return path
    name = path.removeprefix(_OWN_PROTOCOL)
    works = f"give the name {name}" if name != path and is_hub_name(name) else "copy it to a disk and give that path"
    raise UserError(
        f"{path}: {what} is read from a local disk, or by its name on the Hugging Face Hub (OWNER/NAME): {works}"
    )


def _holds(directory: str, pattern: str) -> bool:
    return os.path.isdir(directory) and any(name.endswith(pattern[1:]) for name in os.listdir(directory))


def _how_to_download(repository: str, revision: str | None, files: list[str], result: str) -> str:
    """Returns what to download where there is a network, and where to put it.

    Args:
      files: patterns of the files; empty: all of the repository.
      result: the path of what is wanted below the directory DIR of the download.
    """
    from huggingface_hub import constants  # here, because importing it takes a quarter of a second

    options = f" --revision {revision}" if revision else ""
    options += "".join(f" --include '{pattern}'" for pattern in files)
    return (
        f"where there is a network, run `hf download {repository}{options} --local-dir DIR` and give {result} "
        f"instead, or run it without --local-dir and copy models--{repository.replace('/', '--')} from the cache "
        f"there to {constants.HF_HUB_CACHE}"
    )


def _download(path: str, repository: str, revision: str | None, folder: str, patterns: list[str], advice: str) -> str:
    """Returns the local directory of a repository, with the files of one of its folders that match the patterns."""
    import huggingface_hub

    below = os.path.join(folder, "*/*")  # in a pattern, * stands for slashes too
    try:
        return huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=patterns, ignore_patterns=below
        )
    except Exception as error:  # its own errors, those of the HTTP client, of disks
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        if huggingface_hub.constants.HF_HUB_OFFLINE and type(error).__name__ == "LocalEntryNotFoundError":
            reason = "HF_HUB_OFFLINE is set, and its cache has nothing of this name"
        raise UserError(
            f"{path}: there is no such local path, and the Hugging Face Hub cannot provide it ({reason}); {advice}"
        ) from error
