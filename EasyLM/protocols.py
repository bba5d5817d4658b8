"""The protocols of remote paths, such as gs:// and s3://: which there are, and which package each needs."""

import re

from EasyLM.errors import UnavailableError, UserError, prefix_errors

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "hf": "huggingface_hub", "az": "adlfs", "http": "aiohttp", "https": "aiohttp"}


def check_protocol(protocol: str) -> None:
    """Checks that remote paths such as `protocol://a/b` can be opened.

    Raises:
      UnavailableError: if the protocol is unknown, or its package is not installed.
    """
    import fsspec

    _check_known(protocol)
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        remedy = f"pip install {package}" if package else f"{error}".partition("\n")[0]
        raise UnavailableError(f"{protocol}:// needs a package that is not installed: {remedy}") from None


def _check_known(protocol: str) -> None:
    import fsspec  # here, because local work does not need it: it takes a quarter of a worker's start

    if protocol not in fsspec.available_protocols():
        known = f"known are {', '.join(PACKAGES)} and those of fsspec"
        raise UnavailableError(f"unknown protocol {protocol}://; {known}")


def check_flag(flag: str, value: str, may_be_remote: bool, reads_local_disk: bool = False) -> None:
    """Checks the protocols in the value of a flag: a path, a comma list of paths, or PREFIX::PATH.

    Args:
      may_be_remote: remote paths are allowed.
      reads_local_disk: the command refuses remote paths and names the remedy, which is not to install a package. So it
        does with huggingface::PATH.

    Raises:
      UserError: naming the flag, if one cannot be used.
    """
    with prefix_errors(f"{flag}={value}"):
        if "://" in value and not may_be_remote:
            raise UserError("must be a local path")
        for part in value.split(",") if "://" in value else ():
            prefix, _, protocol = part.partition("://")[0].rpartition("::")
            if protocol != part and re.fullmatch(r"[A-Za-z][\w+.-]*", protocol):
                check = _check_known if reads_local_disk or prefix == "huggingface" else check_protocol
                check(protocol)
