"""`--shard=i/n`: the part of divided work that a process does, and the names of the parts' files."""

import os

from EasyLM.errors import UserError, prefix_errors
from EasyLM.parallel import own_part


def parse_shard(value: str) -> tuple[int, int]:
    """Returns (part i from 0, number of parts n) of `--shard`: i/n, or `auto` for the part of this process.

    Raises:
      UserError: naming the flag, if the value has another form, or this process is no part of divided work.
    """
    if value == "auto":
        with prefix_errors("--shard=auto"):
            return own_part(os.environ)
    part, slash, parts = value.partition("/")
    try:
        numbers = int(part), int(parts)
    except ValueError:
        numbers = -1, 0
    if not slash or not 0 <= numbers[0] < numbers[1]:
        raise UserError(f"--shard={value}: must be i/n with i one of 0..n-1, or auto")
    return numbers


def name_part(path: str, part: int, parts: int) -> str:
    """Replaces {i} and {n}. All {i} have the same number of digits: the order of the names is that of the parts."""
    width = len(str(parts - 1))
    return path.replace("{i}", f"{part:0{width}d}").replace("{n}", str(parts))
