"""Runs the attempts of a kind in worker processes, and keeps the inputs of faults."""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from campaign import mounts
from campaign.attempts import CRASH, FAULTS, HANG, MEMORY, RIGHT, Kind

_LOG_CHARACTERS = 20_000  # of a fault's report
_PREPARE_SECONDS = 900  # on a busy machine
_MOST_KEPT = 20  # faults of a kind whose files are kept
_GRACE_SECONDS = 30  # after the worker's own time limit


@dataclasses.dataclass
class Tally:
    """The results of a kind: tries by verdict, and the folders of faults."""

    tries: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    faults: list[pathlib.Path] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def run_kind(kind: Kind, seed: int, seconds: float, faults: pathlib.Path, numbers: Iterator[int]) -> Tally:
    """Runs attempts of a kind until the time is up.

    Args:
      seconds: the time from the first attempt on; without the preparation, which compiles programs for some kinds.
      faults: the folder for the inputs of faults.
      numbers: of the attempts.
    """
    tally, begin, end = Tally(), time.monotonic(), None
    with tempfile.TemporaryDirectory(prefix="campaign_", ignore_cleanup_errors=True) as name:
        folder = pathlib.Path(name)
        while (end is None or time.monotonic() < end) and (number := next(numbers, None)) is not None:
            with Worker(kind, seed, folder) as worker:
                is_alive, end = worker.is_prepared, end or time.monotonic() + seconds
                while number is not None:
                    verdict, message, tries = worker.attempt(number)
                    tally.tries[verdict] += tries
                    if verdict in FAULTS:
                        tally.faults.append(faults / f"{kind.name}_{seed}_{number}")
                        if len(tally.faults) <= _MOST_KEPT:
                            _keep(folder / "case", tally.faults[-1], worker.log(), kind, seed, number, verdict, message)
                    if verdict in (CRASH, HANG, MEMORY) or time.monotonic() > end:
                        break
                    number = next(numbers, None)
            if not is_alive:  # a new worker would fail too
                break
    tally.seconds = time.monotonic() - begin
    return tally


class Worker:
    """A context manager: a worker process (see `worker`) that prepares a kind.

    Attributes:
      is_prepared: False if the process has died. Attempts are crashes then.
    """

    def __init__(self, kind: Kind, seed: int, folder: pathlib.Path):
        self._kind, self._log_path = kind, folder / "log"
        command = [sys.executable, "-m", "campaign.worker", json.dumps(dataclasses.asdict(kind)), str(seed), folder]
        namespace = mounts.namespace() if kind.mounts else ()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(folder / "cache")}
        if namespace:
            environment[mounts.ALLOWED] = "1"
        self._log_path.unlink(missing_ok=True)  # of a worker that has died: its stacks would be taken for this one's
        with open(self._log_path, "ab") as log:
            self._process = subprocess.Popen(
                [*namespace, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # the programs that it starts end with it
            )

    def __enter__(self) -> "Worker":
        self.is_prepared = self._answer(_PREPARE_SECONDS)[0] == RIGHT
        return self

    def attempt(self, number: int) -> tuple[str, str, int]:
        """Runs an attempt. Returns its verdict, the error and the number of tries."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{number}\n")
            self._process.stdin.flush()
        return self._answer(self._kind.seconds + _GRACE_SECONDS)

    def log(self) -> str:
        """Returns the end of what the worker has printed."""
        return self._log_path.read_text(errors="replace")[-_LOG_CHARACTERS:]

    def _answer(self, seconds: float) -> tuple[str, str, int]:
        output = self._process.stdout
        assert output is not None
        if not select.select([output], [], [], seconds)[0]:
            return HANG, f"no answer of the worker within {seconds:.0f} s", 1
        if line := output.readline():
            verdict, message, tries = json.loads(line)
            return verdict, message, tries
        code = self._process.wait()
        return (HANG if "Timeout (" in self.log() else CRASH), f"the worker ended with code {code}", 1

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _keep(
    case: pathlib.Path, target: pathlib.Path, log: str, kind: Kind, seed: int, number: int, verdict: str, message: str
) -> None:
    """Moves the input of a fault, and writes how it is made again."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    if case.exists():
        shutil.copytree(case, target / "case", symlinks=True)
    report = {"kind": kind.name, "seed": seed, "number": number, "verdict": verdict, "meaning": FAULTS[verdict]}
    report |= {"again": f"python scripts/campaign.py --seed={seed} --again={kind.name}:{number}", "error": message}
    (target / "fault.json").write_text(json.dumps(report, indent=2) + "\n")
    (target / "log.txt").write_text(log)
