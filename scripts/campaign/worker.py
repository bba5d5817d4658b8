"""The process that runs the attempts of one kind: `python -m campaign.worker KIND SEED FOLDER`, with the kind as JSON.

It reads the numbers of attempts from its input, one a line, and answers with a JSON line `[verdict, error, tries]` for
each. The first answer, before any number, says that the kind is prepared. A process runs thousands of attempts, because
its start takes seconds. An attempt that takes too long prints the stacks of all threads and ends the process.
"""

import faulthandler
import json
import os
import pathlib
import resource
import shutil
import sys
import zlib
from typing import TextIO

import numpy as np

from campaign.attempts import MEMORY, REFUSED, RIGHT, Kind, judge

_ADDRESS_SPACE = 8 << 30  # bytes above those of the prepared process: more is refused, and does not fill the machine
_LOG_BYTES = 1 << 20


def main() -> None:
    """Prepares the kind, and runs attempts until the end of the input."""
    kind, seed, folder = Kind(**json.loads(sys.argv[1])), int(sys.argv[2]), pathlib.Path(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the programs' output is no answer
    faulthandler.enable()
    shutil.rmtree(folder / "whole", ignore_errors=True)  # of a worker that has died
    (folder / "whole").mkdir()
    attempt = kind.prepare(folder / "whole")
    _limit_memory()
    baseline = _peak_memory()
    _answer(answers, RIGHT, "", 0)
    for line in sys.stdin:
        number = int(line)
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        if os.path.getsize("/proc/self/fd/2") > _LOG_BYTES:
            os.ftruncate(2, 0)
        faulthandler.dump_traceback_later(kind.seconds, exit=True)
        verdict, message, tries = judge(attempt, random_numbers(seed, kind.name, number), case)
        faulthandler.cancel_dump_traceback_later()
        grown = _peak_memory() - baseline
        if verdict in (RIGHT, REFUSED) and grown > kind.megabytes:
            verdict, message = MEMORY, f"the peak memory grew by {grown} MB; {message}"
        _answer(answers, verdict, message, tries)


def random_numbers(seed: int, kind: str, number: int) -> np.random.Generator:
    """Returns the random numbers of an attempt, which do not depend on other attempts."""
    return np.random.default_rng([seed, zlib.crc32(kind.encode()), number])


def _limit_memory() -> None:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _peak_memory() -> int:
    """Returns the largest resident memory so far, in MB. (`getrusage` also counts the parent before the exec.)"""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


def _answer(answers: TextIO, verdict: str, message: str, tries: int) -> None:
    answers.write(json.dumps([verdict, message, tries]) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
