"""Checks the free disk space before an output is written."""

import os
import shutil

from EasyLM.errors import UserError


def check_disk_space(path: str, needed_bytes: int) -> None:
    """Checks that the disk of a file has enough free space.

    Raises:
      UserError: naming the path, if less than `needed_bytes` are free.
    """
    free_bytes = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
    if needed_bytes > free_bytes:
        raise UserError(
            f"{path}: needs about {needed_bytes / 1e9:.2f} GB of disk space, {free_bytes / 1e9:.2f} GB are free"
        )
