"""scripts/campaign.py: mutations are seeded, no fault counts as a refusal, and a minute finds no fault."""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from campaign import attempts, client, http_requests, mutations
from campaign.attempts import Kind
from campaign.kinds import KINDS

from EasyLM.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


def raising(error: BaseException):
    def attempt(rng, case):
        raise error

    return attempt


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (UserError("/case/a: is damaged"), "refused"),
        (FileNotFoundError(2, "No such file", "/case/a"), "refused"),
        (UserError("is damaged"), "unclear"),
        (UserError("x" * 2000 + "/case/a: is damaged" + "x" * 2000), "unclear"),
        (OSError("/elsewhere: no"), "unclear"),
        (attempts.WrongOutputError("/case/a"), "silent"),
        (KeyError("/case/a"), "traceback"),
        (RecursionError("/case/a"), "traceback"),
        (MemoryError("/case/a"), "memory"),
    ],
)
def test_only_a_clear_error_is_a_refusal(error, verdict):
    judged = attempts.judge(raising(error), np.random.default_rng(0), pathlib.Path("/case"))
    assert judged[0] == verdict
    assert (verdict in attempts.FAULTS) == (verdict != "refused")


def test_only_the_first_answer_of_a_connection_counts():
    """The service takes what follows a request of a smaller length for a further request."""
    first, second = (f"HTTP/1.1 {line}\r\nContent-Length: 2\r\n\r\n".encode() for line in ("422 No", "400 Bad"))
    answer = http_requests._Answer(first + b"{}" + second + b"ab")
    assert (answer.status, answer.body) == (422, b"{}")
    assert http_requests._Answer(first + b"{").body == b"{"
    assert http_requests._Answer(b"").status == 0


def test_mutations_are_seeded_and_various():
    data, value = bytes(range(256)) * 4, {"a": [1, {"b": "x"}], "c": None}
    for mutated, whole in ((mutations.mutated, data), (mutations.mutated_json, value)):
        first, again = ([mutated(np.random.default_rng(seed), whole) for seed in range(200)] for _ in range(2))
        assert first == again and len(set(first)) > 100
    assert data == bytes(range(256)) * 4 and value == {"a": [1, {"b": "x"}], "c": None}
    lengths = {len(mutated) for mutated in (mutations.mutated(np.random.default_rng(i), data) for i in range(200))}
    assert min(lengths) < len(data) / 2 and max(lengths) >= 2 * len(data)


def run(tmp_path, function: str, numbers, **limits) -> client.Tally:
    kind = Kind(function, "campaign_kit", function, **limits)
    return client.run_kind(kind, 5, 60, tmp_path / "faults", iter(numbers))


def test_tries_are_counted_and_faults_are_kept(tmp_path):
    tally = run(tmp_path, "mixed", range(50))
    assert not tally.faults and tally.tries["refused"] + tally.tries["right"] // 3 == 50
    assert 10 < tally.tries["refused"] < 40 and not (tmp_path / "faults").exists()

    tally = run(tmp_path, "silent", [4, 7])
    assert tally.tries == {"silent": 2} and [folder.name for folder in tally.faults] == ["silent_5_4", "silent_5_7"]
    report = json.loads((tally.faults[1] / "fault.json").read_text())
    assert report["error"] == "7 instead of 8" and report["again"].endswith("--seed=5 --again=silent:7")
    content = (tally.faults[1] / "case" / "input").read_bytes()
    again = run(tmp_path / "again", "silent", [7])
    assert (again.faults[0] / "case" / "input").read_bytes() == content


@pytest.mark.parametrize(
    ("function", "limits"), [("crash", {}), ("hang", {"seconds": 0.2}), ("memory", {"megabytes": 10})]
)
def test_the_death_of_a_worker_is_a_fault(tmp_path, function, limits):
    tally = run(tmp_path, function, [0], **limits)
    assert tally.tries == {function: 1} and len(tally.faults) == 1
    if function != "memory":
        assert "campaign_kit.py" in (tally.faults[0] / "log.txt").read_text()  # the stack


def test_the_end_of_a_worker_is_not_judged_by_the_log_of_another_one(tmp_path):
    assert run(tmp_path, "hang_then_crash", [0, 1], seconds=0.2).tries == {"hang": 1, "crash": 1}


def test_a_kind_that_cannot_be_prepared_is_one_fault(tmp_path):
    tally = run(tmp_path, "missing", range(5))
    assert tally.tries == {"crash": 1} and "has no attribute 'missing'" in (tally.faults[0] / "log.txt").read_text()


@pytest.mark.slow
def test_three_minutes_find_no_fault(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, ROOT / "scripts" / "campaign.py", "--minutes=3", f"--output_dir={tmp_path}"]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert completed.returncode == 0, completed.stdout[-5000:] + completed.stderr[-3000:]
    lines = completed.stdout.splitlines()
    heads = next(line for line in lines if line.startswith("kind ")).split()
    rows = {name: line.split() for line, name in itertools.product(lines, KINDS) if re.match(rf"{name} +\d", line)}
    for name in KINDS:
        row = dict(zip(heads, rows[name], strict=True))
        assert int(row["right"]) + int(row["refused"]) == int(row["tries"]) >= 1, row
