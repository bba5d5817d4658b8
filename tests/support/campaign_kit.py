"""Kinds of attempts with known verdicts, for the tests of scripts/campaign.py. The worker process imports this file."""

import os
import pathlib
import signal
import time

import numpy as np
from campaign.attempts import Attempt, WrongOutputError

from EasyLM.errors import UserError


def mixed(folder: pathlib.Path) -> Attempt:
    """Half of the attempts are refused with a clear error, the other half are right."""

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> int:
        (case / "input").write_bytes(rng.bytes(8))
        if rng.random() < 0.5:
            raise UserError(f"{case}/input: is damaged")
        return 3

    return attempt


def silent(folder: pathlib.Path) -> Attempt:
    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        (case / "input").write_bytes(rng.bytes(8))
        raise WrongOutputError("7 instead of 8")

    return attempt


def crash(folder: pathlib.Path) -> Attempt:
    return lambda rng, case: os.kill(os.getpid(), signal.SIGSEGV)


def hang(folder: pathlib.Path) -> Attempt:
    return lambda rng, case: time.sleep(60)


def hang_then_crash(folder: pathlib.Path) -> Attempt:
    """The first worker hangs, the next one dies."""
    started = folder.parent / "started"
    is_first = not started.exists()
    started.touch()
    return (hang if is_first else crash)(folder)


def memory(folder: pathlib.Path) -> Attempt:
    return lambda rng, case: int(np.ones(40 << 20, np.uint8)[0])
