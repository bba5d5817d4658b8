"""Mixing and packing refuse an incomplete sharded build, by the reports of its parts."""

import json

import pytest
import tokenizer_kit

from EasyLM.data import records
from EasyLM.errors import UserError
from tokenizer import mix, pack


def write_part(path, part: int, parts: int, **settings) -> None:
    """Writes a part of one sentence, with its report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(records.record_line([part]))
    report = {"bytes": path.stat().st_size, "identity": {"seed": 0, "shard": f"{part}/{parts}"} | settings}
    path.with_name(f"{path.name}.report.json").write_text(json.dumps(report))


def mixed(tmp_path, inputs: str) -> int:
    """Mixes files of a folder; returns the number of sentences."""
    paths = ",".join(f"{tmp_path}/{name}" for name in inputs.split(","))
    tokenizer_kit.run_main(mix, inputs=paths, output_file=f"{tmp_path}/mixed.jsonl")
    return (tmp_path / "mixed.jsonl").read_bytes().count(b"\n")


@pytest.fixture
def builds(tmp_path):
    """Two complete builds, a whole build and a file without a report."""
    for part in range(12):
        write_part(tmp_path / "a" / f"{part}.jsonl", part, 12)
    for part in range(2):
        write_part(tmp_path / "a" / f"other_{part}.jsonl", part, 2, seed=1)
    write_part(tmp_path / "whole.jsonl", 0, 1)
    (tmp_path / "bare.jsonl").write_bytes(records.record_line([1]))
    return tmp_path


def test_complete_builds_are_mixed_also_over_several_inputs(builds):
    assert mixed(builds, "a/?.jsonl,a/1?.jsonl,a/other_0.jsonl,a/other_1.jsonl,whole.jsonl,bare.jsonl") == 16


def test_a_missing_part_is_named(builds):
    (builds / "a" / "7.jsonl").rename(builds / "a" / "7.jsonl.partial")
    (builds / "a" / "10.jsonl").unlink()
    message = r"a/0.jsonl is part 0 of 12 of a build .*, of which 2 are missing: 7, 10; unfinished are 7.jsonl.partial"
    with pytest.raises(UserError, match=message):
        mixed(builds, "a/*.jsonl")
    assert not (builds / "mixed.jsonl").exists()
    with pytest.raises(UserError, match="of which 2 are missing"):
        tokenizer_kit.run_main(pack, input_files=f"{builds}/a/*.jsonl", output_file=f"{builds}/out.packed")
    with pytest.raises(UserError, match=r"1 of 2 of a build .*1 are missing: 0"):
        mixed(builds, "a/other_1.jsonl")


def test_parts_that_do_not_belong_together_are_named(builds):
    write_part(builds / "a" / "copy.jsonl", 3, 12)
    with pytest.raises(UserError, match=r"a/copy.jsonl: is part 3 of 12 of a build, and so is .*a/3.jsonl"):
        mixed(builds, "a/*.jsonl")
    write_part(builds / "a" / "copy.jsonl", 3, 12, seed=7)
    with pytest.raises(UserError, match=r"a/copy.jsonl is part 3 of 12 .*11 are missing: 0, 1, 2, 4, .*, 10, \.\.\."):
        mixed(builds, "a/*.jsonl")
    (builds / "a" / "copy.jsonl").unlink()
    (builds / "a" / "3.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"a/3.jsonl: has 0 bytes, but .*3.jsonl.report.json says \d+"):
        mixed(builds, "a/*.jsonl")
