"""`--shard` and `--parts`: the parts of divided work that a process does, and the names of the parts' files."""

import os
from typing import NamedTuple

from EasyLM.errors import UserError, prefix_errors
from EasyLM.parallel import own_part

BY_FILES = "files"  # a value of --parts


class Share(NamedTuple):
    """What a process does.

    Attributes:
      first: the part to begin with.
      parts: their number.
      takes_over: whether it continues with other parts.
    """

    first: int
    parts: int
    takes_over: bool


def parse_shard(value: str) -> tuple[int, int]:
    """Returns (part i from 0, number of parts n) of `--shard`: i/n, or `auto` for the part of this process.

    Raises:
      UserError: naming the flag, if the value has another form, or this process is not part of a batch job.
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


def parse_share(shard: str, parts: str, output_file: str, fresh: bool, files: int | None) -> Share:
    """Returns the share of this process by the flags.

    Args:
      shard: as `parse_shard` takes it.
      parts: the number of parts for any number of processes; BY_FILES; or empty: as many as tasks.
      output_file: names the file of a part if it contains {i}.
      fresh: whether finished files are discarded.
      files: the number of parts BY_FILES.

    Raises:
      UserError: as `parse_shard` does, or if the flags contradict each other.
    """
    has_number = "{i}" in output_file
    if not parts:
        return Share(*parse_shard(shard), shard == "auto" and has_number and not fresh)
    if shard != "auto":
        raise UserError(f"--parts={parts}: needs --shard=auto")
    if not has_number:
        raise UserError(f"--parts={parts}: --output_file={output_file} must contain {{i}}, the number of a part")
    if files is None and not (parts.isdecimal() and int(parts)):
        raise UserError(f"--parts={parts}: must be a number of at least 1, or {BY_FILES}")
    count = files or int(parts)
    if fresh:
        files_of_parts = output_file.replace("{i}", "*").replace("{n}", str(count))
        raise UserError(
            f"--parts={parts}: --fresh would discard the parts of other processes. To start again, end them and delete "
            f"{files_of_parts}*"
        )
    try:
        task, tasks = own_part(os.environ)
    except UserError:  # no batch system, or some tasks of an array: it does not matter where a process begins
        task, tasks = 0, 1
    return Share(task * count // tasks, count, True)


def name_part(path: str, part: int, parts: int) -> str:
    """Replaces {i} and {n}. All {i} have the same number of digits: the order of the names is that of the parts."""
    width = len(str(parts - 1))
    return path.replace("{i}", f"{part:0{width}d}").replace("{n}", str(parts))
