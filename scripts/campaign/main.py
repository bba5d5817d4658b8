"""Kills, fills disks and mutates for a number of minutes: `python scripts/campaign.py --minutes=3 --seed=0`.

Each try is right, refused with a clear error, or a fault. The command prints a table, keeps the input of each fault in
a folder, and prints the command that repeats it. The exit code is 1 if there are faults.
"""

import itertools
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from ml_collections import ConfigDict

from campaign import mounts
from campaign.attempts import VERDICTS, Kind
from campaign.client import Tally, run_kind
from campaign.kinds import KINDS
from EasyLM.errors import UserError, choose
from EasyLM.flags import Flag, run

FLAGS = {
    "minutes": Flag(3.0, "Time in total.", above=0),
    "seed": Flag(0, "Seed of all attempts.", least=0),
    "kinds": Flag("", f"Comma list of kinds; empty: all. The kinds: {', '.join(KINDS)}."),
    "output_dir": Flag("runs/campaign", "Folder for the inputs of faults."),
    "again": Flag("", "KIND:NUMBER: make one attempt of the seed again. A fault's report names it."),
}
# Shares of the time, of kinds that do not get 1. A kill takes seconds.
_SHARES = {"killed_runs": 6.0, "killed_builds": 1.5, "service_requests": 2.0}
_PREPARE_SECONDS = 4  # of a kind, on average
_MOST_NAMED = 10  # faults of a kind in the output


def main(config: ConfigDict) -> int:
    """Runs the kinds, and prints their results. Returns the exit code."""
    output_dir = pathlib.Path(config.output_dir).absolute()
    if config.again:
        name, _, number = config.again.partition(":")
        if not number.isdecimal():
            raise UserError(f"--again={config.again}: must be KIND:NUMBER")
        kind = KINDS[choose("--again", name, KINDS)]
        return _report({kind.name: run_kind(kind, config.seed, kind.seconds, output_dir, iter([int(number)]))})
    names = config.kinds.split(",") if config.kinds else list(KINDS)
    kinds = [KINDS[choose("--kinds", name, KINDS)] for name in names]
    print(f"{config.minutes:g} minutes, seed {config.seed}; disks are filled as {mounts.description()}", flush=True)
    end = time.monotonic() + 60 * config.minutes
    # Two kinds run at a time: of those that run processes, and of those that call functions.
    lanes = [[kind for kind in kinds if kind.runs_processes == runs_processes] for runs_processes in (True, False)]
    with ThreadPoolExecutor(len(lanes)) as threads:
        futures = [threads.submit(_run_lane, lane, config.seed, end, output_dir) for lane in lanes]
        tallies = {name: tally for future in futures for name, tally in future.result().items()}
    return _report(tallies)


def _run_lane(kinds: Sequence[Kind], seed: int, end: float, output_dir: pathlib.Path) -> dict[str, Tally]:
    """Runs kinds one after the other. Each gets its share of the time that is left."""
    tallies, shares = {}, [_SHARES.get(kind.name, 1.0) for kind in kinds]
    for number, kind in enumerate(kinds):
        left = end - time.monotonic() - _PREPARE_SECONDS * len(kinds[number:])
        seconds = max(0.0, left) * shares[number] / sum(shares[number:])
        tallies[kind.name] = run_kind(kind, seed, seconds, output_dir, itertools.count())
        results = ", ".join(f"{count} {verdict}" for verdict, count in tallies[kind.name].tries.items())
        print(f"    {kind.name}: {results}", flush=True)
    return tallies


def _report(tallies: Mapping[str, Tally]) -> int:
    """Prints the table and the faults. Returns the exit code."""
    print("\n".join(_table(tallies)))
    for name, tally in tallies.items():
        for folder in tally.faults[:_MOST_NAMED]:
            print(f"fault: {folder}")
        if len(tally.faults) > _MOST_NAMED:
            print(f"    and {len(tally.faults) - _MOST_NAMED} more of {name}")
    faults = sum(len(tally.faults) for tally in tallies.values())
    print(f"{faults} faults" + ("; fault.json in each folder says how to make it again" if faults else ""))
    return 1 if faults else 0


def _table(tallies: Mapping[str, Tally]) -> Iterator[str]:
    heads = ("tries", *VERDICTS, "seconds")
    rows = {"kind": heads}
    for name, tally in tallies.items():
        counts = [sum(tally.tries.values()), *(tally.tries[verdict] for verdict in VERDICTS), round(tally.seconds)]
        rows[name] = tuple(map(str, counts))
    rows["total"] = tuple(str(sum(int(row[i]) for row in list(rows.values())[1:])) for i in range(len(heads)))
    width = max(map(len, rows))
    for name, row in rows.items():
        yield f"{name:<{width}}  " + "  ".join(f"{cell:>{max(len(head), 5)}}" for cell, head in zip(row, heads))


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
