"""The parts of a sharded build: refuses inputs that hold only some of them."""

import collections
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from EasyLM.errors import UserError
from EasyLM.storage import file_version, read_json

_REPORT = {"identity?": dict, "bytes?": int}
_OF_ONE_PART = ("shard", "part_inputs")  # the other fields of an identity are those of the whole build
_MOST_NAMED = 10


def check_parts(paths: Sequence[str]) -> None:
    """Checks that the files contain each part of each sharded build (`tokenizer.build --shard=i/n`) once.

    The report beside a file says which part it is. Files without a report are no parts.

    Raises:
      UserError: naming the missing parts; if a part is given twice, or its size differs from that in its report.
    """
    builds: dict[tuple[str, int], dict[int, str]] = collections.defaultdict(dict)
    for path in paths:
        report = _report(path)
        part, parts = _part(report)
        if parts < 2:
            continue
        size = file_version(path)["size"]
        if size != report["bytes"]:
            raise UserError(f"{path}: has {size} bytes, but {path}.report.json says {report['bytes']}: copy it again")
        identity = {name: value for name, value in report["identity"].items() if name not in _OF_ONE_PART}
        by_part = builds[json.dumps(identity, sort_keys=True), parts]
        if part in by_part:
            raise UserError(f"{path}: is part {part} of {parts} of a build, and so is {by_part[part]}")
        by_part[part] = path
    for (_, parts), by_part in builds.items():
        missing = [part for part in range(parts) if part not in by_part]
        if missing:
            names = ", ".join(map(str, missing[:_MOST_NAMED])) + ", ..." * (len(missing) > _MOST_NAMED)
            example = by_part[min(by_part)]
            unfinished = sorted(name for name in _beside(example) if name.endswith(".partial"))
            started = f"; unfinished are {', '.join(unfinished[:_MOST_NAMED])}" if unfinished else ""
            raise UserError(
                f"{example} is part {min(by_part)} of {parts} of a build with the same settings and inputs, of which "
                f"{len(missing)} are missing: {names}{started}. Finish the build, or move its reports away to use "
                "the parts that exist"
            )


def _report(path: str) -> dict[str, Any]:
    try:
        return read_json(f"{path}.report.json", _REPORT)
    except FileNotFoundError:  # not from a build
        return {}


def _part(report: Mapping[str, Any]) -> tuple[int, int]:
    """Returns (part, number of parts) of a report; (0, 1) if it is that of a whole build."""
    part, _, parts = str(report.get("identity", {}).get("shard", "0/1")).partition("/")
    return (int(part), int(parts)) if part.isdigit() and parts.isdigit() and "bytes" in report else (0, 1)


def _beside(path: str) -> list[str]:
    folder = os.path.dirname(path) or "."
    return os.listdir(folder) if os.path.isdir(folder) else []
