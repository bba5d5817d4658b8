"""Checks and measures this machine's GPU: `bash scripts/gpu_day.sh --output_json=FILE` (under 9 minutes).

Each job runs in a process of its own with a time limit, in the order of importance, so that a failure or a slow job
does not lose the others. Records are written to the file as they arrive. The table is printed last. The exit code is 1
if a check failed or a job crashed.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from ml_collections import ConfigDict

from EasyLM.errors import choose
from EasyLM.flags import Flag, run
from EasyLM.storage import write_json
from gpu_day import table
from gpu_day.measure import RECORD

FLAGS = {
    "output_json": Flag("", "File of the records.", required=True),
    "jobs": Flag("", "Comma list of SECTION or SECTION:PRESET, such as machine,train:vqlm_1b; empty: all."),
    "time_limit": Flag(520.0, "Seconds in total. Jobs that find no time left are skipped.", above=0),
    "tiny": Flag(False, "Use tiny sizes, for a test on a CPU."),
}
# CUDA graphs include the loop over tokens, so that the host launches one graph for several tokens.
_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
_LEAST_SECONDS = 10  # a job that gets less time than this is skipped


@dataclasses.dataclass(frozen=True)
class Job:
    """A process: `python -m gpu_day.MODULE ARGUMENTS`.

    Attributes:
      seconds: time limit.
      preset: the preset that it measures, if any.
      xla_flags: for the environment of the process.
    """

    module: str
    seconds: float
    arguments: tuple[str, ...] = ()
    preset: str = ""
    xla_flags: str = ""

    @property
    def labels(self) -> set[str]:
        """The names that select the job in `--jobs`."""
        return {self.module} | ({f"{self.module}:{self.preset}"} if self.preset else set())

    @property
    def name(self) -> str:
        """The command line after `gpu_day.`."""
        return " ".join([self.module, *([f"--preset={self.preset}"] if self.preset else []), *self.arguments])


JOBS = [
    Job("machine", 60),
    Job("correctness", 100),
    Job("train", 75, preset="vqlm_1b"),
    Job("train", 75, ("--only=num_hidden_layers",), preset="vqlm_7b"),
    Job("train", 60, preset="vqlm_3b"),
    Job("train", 60, preset="vqlm_100m"),
    Job("decode", 75, preset="vqlm_1b"),
    Job("decode", 60, ("--cases=1x16",), preset="vqlm_7b"),
    Job("peer", 90, ("--rounds=2",), preset="vqlm_1b"),
    Job("vqgan", 70),
    Job("train", 60, ("--only=LoRA",), preset="vqlm_7b"),
    Job("decode", 60, ("--cases=4x3840",), preset="vqlm_7b"),
    Job(
        "decode",
        50,
        ("--cases=1x16", "--variant=loop in a CUDA graph"),
        preset="vqlm_1b",
        xla_flags=f"--xla_gpu_enable_command_buffer={_GRAPHS}",
    ),
    Job("peer", 80, ("--cases=4x3840", "--rounds=2", "--compiled=False"), preset="vqlm_7b"),
]
TINY_JOBS = [
    Job("machine", 120, ("--tiny",)),
    Job("correctness", 300, ("--tiny",)),
    Job("train", 120, ("--seq_length=64", "--seconds=0.1"), preset="vqlm_debug"),
    Job("decode", 120, ("--cases=2x16", "--new_tokens=4"), preset="vqlm_debug"),
    Job("vqgan", 120, ("--resolution=16", "--cases=fp32x2", "--batches=1")),
]


def main(config: ConfigDict) -> int:
    """Runs the chosen jobs. Returns the exit code."""
    end, report = time.monotonic() + config.time_limit, Report(config.output_json)
    for job in chosen(TINY_JOBS if config.tiny else JOBS, config.jobs):
        limit = min(job.seconds, end - time.monotonic())
        if limit < _LEAST_SECONDS:
            report.add({"section": job.module, "name": job.name, "error": "skipped: no time left", **not_checked(job)})
        else:
            run_job(job, limit, report)
    print(table.text(report.records))
    print(f"{config.time_limit - (end - time.monotonic()):.0f} s in total; records: {config.output_json}")
    return 1 if any(record.get("ok") is False for record in report.records) else 0


def chosen(jobs: list[Job], text: str) -> list[Job]:
    """Returns the jobs that `--jobs` selects, in their order.

    Raises:
      UserError: if a name selects none.
    """
    labels = sorted(set().union(*(job.labels for job in jobs)))
    names = {choose("--jobs", name, labels) for name in text.split(",")} if text else set(labels)
    return [job for job in jobs if names & job.labels]


class Report:
    """The records so far, which are written to a file after each change."""

    def __init__(self, path: str):
        self.records: table.Records = []
        self._path = path
        self._write()

    def add(self, record: dict) -> None:
        """Adds a record."""
        self.records.append(record)
        self._write()

    def _write(self) -> None:
        write_json(self._path, {"records": table.with_shares(self.records)})


def not_checked(job: Job) -> dict[str, bool]:
    """Returns the values of a record that make the program fail if a job that did not end has checks."""
    return {"ok": False} if job.module == "correctness" else {}


def run_job(job: Job, limit: float, report: Report) -> None:
    """Runs a job and collects its records. Adds a record if it crashes or exceeds the limit."""
    print(f"--- {job.name}", flush=True)
    begin = time.monotonic()
    command = [sys.executable, "-m", f"gpu_day.{job.module}", *job.arguments]
    command += [f"--preset={job.preset}"] if job.preset else []
    environment = dict(os.environ)
    if job.xla_flags:
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {job.xla_flags}".strip()
    # The process leads a group of its own, which ends with it.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    reader = threading.Thread(target=_collect, args=(process, report.add))
    reader.start()
    failure: dict = {}
    try:
        code = process.wait(limit)
        failure = {} if code == 0 else {"error": f"exit code {code}", "ok": False}
    except subprocess.TimeoutExpired:
        failure = {"error": f"stopped after {limit:.0f} s", **not_checked(job)}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join()
    if failure:
        report.add({"section": job.module, "name": job.name, **failure})
    print(f"    {time.monotonic() - begin:.0f} s", flush=True)


def _collect(process: subprocess.Popen, add: Callable[[dict], None]) -> None:
    """Adds the records in the output of a process, and prints the output."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith(RECORD):
                add(json.loads(line.removeprefix(RECORD)))


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
