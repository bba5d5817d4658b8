"""Files of measurements: JSON lines in zstd frames, one object for each image. `FILE.report.json` describes the file.

A sharded source has a file for each part.
"""

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson
import zstandard

from EasyLM.errors import UnavailableError, UserError, prefix_errors
from EasyLM.process_pool import Workers, result
from EasyLM.progress import progress
from EasyLM.skipped_inputs import SkippedInputs
from EasyLM.storage import check_schema, file_version, read_json, read_lines
from tokenizer.builders.resumable_file import ResumableFile
from tokenizer.filter import measuring
from tokenizer.filter.listing import Entry, Listing

_VERSION = 2  # increases when the same images give other measurements
_GROUP = 64  # images that a worker measures at a time
_FRAME_LINES = 4096  # lines that are compressed together
_STATE = {"number": int, "measured": int, "seconds": float, "skipped": {str: str}}
_IDENTITY = {"version": int, "source": str, "inputs": str, "by_files": bool, "scores": [str], "shard": str}
_REPORT = {
    "identity": _IDENTITY,
    "bytes": int,
    "measured": int,
    "files": {str: list},
    "skipped": [{"input": str, "reason": str}],
}
_MOST_NAMED = 10  # missing parts


def write_measurements(
    path: str, listing: Listing, scores: Sequence[str], shard: str, skipped: SkippedInputs, processes: int, fresh: bool
) -> None:
    """Measures the images of a part that the file does not contain yet.

    Args:
      path: the file.
      listing: the part.
      scores: of each image.
      shard: i/n, the number of the part.
      skipped: takes the images that cannot be read.
      processes: number of workers.
      fresh: discard what the file contains.
    """
    identity = {
        "version": _VERSION,
        "source": listing.source,
        "inputs": listing.digest,
        "by_files": listing.by_files,
        "scores": list(scores),
        "shard": shard,
    }
    with contextlib.closing(ResumableFile(path, identity, fresh)) as file:
        if file.finished_report is None:
            file.claim()
        if file.finished_report is not None:
            print(f"{path} is already complete: {summary(file.finished_report)}")
            return
        report = _write(file, listing, scores, skipped, processes)
        file.finish({**report, "files": listing.names.files()})
    print(f"{path}: {summary(report)}")


def _write(
    file: ResumableFile,
    listing: Listing,
    scores: Sequence[str],
    skipped: SkippedInputs,
    processes: int,
) -> dict[str, Any]:
    numbers = listing.numbers
    state = file.state or {"number": numbers.start, "measured": 0, "seconds": 0.0, "skipped": {}}
    with prefix_errors(f"{file.path}.progress.json"):
        check_schema(state, _STATE, "state")
    skipped.restore(state["skipped"])
    start, lines = time.monotonic() - state["seconds"], []
    remaining = range(state["number"], numbers.stop)
    with (
        Workers(processes) as workers,
        progress(unit="image", desc="measuring", total=len(numbers), initial=len(numbers) - len(remaining)) as bar,
    ):
        for entries, measured in _measure(listing.entries(remaining), scores, workers):
            for entry, value in zip(entries, measured, strict=True):
                if isinstance(value, str):
                    skipped.add(entry.address, value)
                else:
                    lines.append(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))
                    state["measured"] += 1
            state["number"] += len(entries)
            bar.update(len(entries))
            is_due = file.save_is_due()
            if is_due or len(lines) >= _FRAME_LINES:
                file.write(_compress(lines))
                lines.clear()
            if is_due:
                file.save({**state, "seconds": time.monotonic() - start, "skipped": skipped.reasons})
    file.write(_compress(lines))
    return {
        "measured": state["measured"],
        "skipped": [{"input": path, "reason": reason} for path, reason in sorted(skipped.reasons.items())],
        "seconds": round(time.monotonic() - start, 1),
    }


def _compress(lines: Sequence[bytes]) -> bytes:
    """Returns a zstd frame, with a checksum that is verified when it is read."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(b"".join(lines))


def _measure(
    entries: Iterator[Entry], scores: Sequence[str], workers: Workers
) -> Iterator[tuple[list[Entry], list[dict[str, Any] | str]]]:
    """Yields groups of images and their measurements, in order."""
    pending: collections.deque = collections.deque()

    def finish() -> tuple[list[Entry], list[dict[str, Any] | str]]:
        group, future = pending.popleft()
        with contextlib.suppress(UserError):
            return group, result(future, group[0].address)
        return group, [_measure_alone(entry, scores, workers) for entry in group]  # one of them has killed its process

    group: list[Entry] = []
    for entry in entries:
        group.append(entry)
        if len(group) == _GROUP:
            pending.append((group, workers.submit(measuring.measure, group, scores)))
            group = []
        if len(pending) > 2 * workers.processes:
            yield finish()
    if group:
        pending.append((group, workers.submit(measuring.measure, group, scores)))
    while pending:
        yield finish()


def _measure_alone(entry: Entry, scores: Sequence[str], workers: Workers) -> dict[str, Any] | str:
    try:
        (measured,) = result(workers.submit(measuring.measure, [entry], scores), entry.address)
    except UnavailableError:
        raise
    except UserError as error:
        return str(error)
    return measured


def summary(report: Mapping[str, Any]) -> str:
    """Returns the counts of a report in words."""
    skipped = f", {len(report['skipped'])} inputs skipped" if report["skipped"] else ""
    rate = report["measured"] / max(report["seconds"], 0.1)
    return f"{report['measured']} images measured{skipped}, {rate:.0f} images/s"


class Measurements:
    """Complete files of measurements, of all parts of a source.

    Attributes:
      files: the images of the source, with those that could not be read.
      measured: number of measurements.
      skipped: what could not be read: {"input", "reason"} of each.
      scores: names of the scores of each measurement.
    """

    def __init__(self, paths: Sequence[str]):
        """Reads the reports of the files.

        Raises:
          UserError: naming the file, if it is incomplete or another part is missing; if the files are of several
            sources.
        """
        parts = _parts({path: _report(path) for path in paths})
        self._paths = [path for path, _ in parts]
        reports = [report for _, report in parts]
        self.scores = tuple(reports[0]["identity"]["scores"])
        by_files = reports[0]["identity"]["by_files"]
        # A part of tars has tars of its own. Each part of another source lists all images.
        by_name = {
            name: file for report in (reports if by_files else reports[:1]) for name, file in report["files"].items()
        }
        self.files = dict(sorted(by_name.items()))
        self.measured = sum(report["measured"] for report in reports)
        # Each part of a source other than tars lists the whole source, and reports the same inputs as unusable.
        self.skipped = list({entry["input"]: entry for report in reports for entry in report["skipped"]}.values())

    def images(self) -> int:
        """Returns the number of images of the source."""
        return sum(count for count, _ in self.files.values())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the measurements of all parts in order.

        Raises:
          UserError: naming FILE:LINE, if a line is not a measurement.
        """
        count = 0
        for path in self._paths:
            for number, line in read_lines(path):
                try:
                    yield orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    raise UserError(f"{path}:{number}: not JSON ({error})") from None
                count += 1
        if count != self.measured:
            raise UserError(f"{', '.join(self._paths)}: have {count} lines, but the reports say {self.measured}")


def _parts(reports: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns (path, report) of the parts in their order. Checks that each part of one source is there once."""
    parts: dict[int, str] = {}
    first, *_ = reports
    common = _common(reports[first])
    for path, report in reports.items():
        if _common(report) != common:
            raise UserError(f"{path} and {first} are not parts of one source with the same scores")
        part = int(report["identity"]["shard"].partition("/")[0])
        if part in parts:
            raise UserError(f"{path}: is part {part} of a source, and so is {parts[part]}")
        parts[part] = path
    count = int(common[-1])
    if missing := [str(part) for part in range(count) if part not in parts]:
        names = ", ".join(missing[:_MOST_NAMED]) + ", ..." * (len(missing) > _MOST_NAMED)
        raise UserError(f"{first}: is one of {count} parts of a source, of which {len(missing)} are missing: {names}")
    return [(parts[part], reports[parts[part]]) for part in range(count)]


def _common(report: Mapping[str, Any]) -> tuple:
    """Returns what the reports of all parts share; the last item is the number of the parts."""
    identity = report["identity"]
    inputs = "" if identity["by_files"] else identity["inputs"]
    return identity["source"], inputs, tuple(identity["scores"]), identity["shard"].partition("/")[2]


def _report(path: str) -> dict[str, Any]:
    size = file_version(path)["size"]
    try:
        report = read_json(f"{path}.report.json", _REPORT)
    except FileNotFoundError:
        raise UserError(f"{path}: is not complete, or its {path}.report.json is missing") from None
    if report["identity"]["version"] != _VERSION:
        raise UserError(f"{path}: is of another version of tokenizer.filter: measure again")
    if report["bytes"] != size:
        raise UserError(f"{path}: has {size} bytes, but {path}.report.json says {report['bytes']}: copy it again")
    return report
