"""Checksums beside streaming files: damage is found and named, files without checksums load as before."""

import json
import shutil

import numpy as np
import pytest
from checkpoint_kit import file_content, make_checkpointer, save

from EasyLM import checkpoints
from EasyLM.checkpoints import checksums, streaming
from EasyLM.errors import UserError

STATE = "streaming_train_state"


@pytest.fixture
def run(tmp_path):
    """A run with one checkpoint, in which all numbers are 3."""
    save(make_checkpointer(tmp_path), 3, milestone=True)
    return tmp_path


def read_all(path) -> dict:
    return {entry.key: entry.read() for entry in checkpoints.open_checkpoint(f"trainstate::{path}")}


def test_every_flipped_bit_is_found(run):
    """In arrays and in headers: the file is refused, or its content is the same."""
    path = run / "checkpoints" / "step_00000003" / STATE
    data, expected = path.read_bytes(), file_content(path)
    refused = 0
    for bit in range(0, 8 * len(data), 5):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            content = read_all(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert content.keys() == expected.keys()
            for key, array in content.items():
                np.testing.assert_array_equal(array, expected[key])
    assert refused > 0.99 * len(range(0, 8 * len(data), 5))


def test_the_damaged_array_is_named(run):
    path = run / "checkpoints" / "step_00000003" / STATE
    name = "params/params/transformer/h/1/w"
    data = bytearray(path.read_bytes())
    begin = data.index(np.full(12, 3, np.float32).tobytes(), data.index(b"params", data.index(b"h\xa11\xa1w") - 60))
    data[begin] ^= 1
    path.write_bytes(data)
    for spec in (f"trainstate::{run}/{STATE}", f"trainstate_params::{run}/{STATE}_3"):
        with pytest.raises(checkpoints.DamagedArrayError, match=f"{path}: the array {name} is damaged"):
            checkpoints.load(spec)


@pytest.mark.parametrize(
    ("change", "has_checksums"),  # without checksums, the target of a load tells that an array is left out
    [
        ("truncated", True),
        ("truncated", False),
        ("joined to itself", True),
        ("joined to itself", False),
        ("an array left out", True),
    ],
)
def test_files_of_another_length_are_refused(run, change, has_checksums):
    directory = run / "checkpoints" / "step_00000003"
    data = (directory / STATE).read_bytes()
    second = data.index(b"\x92", 1)
    changed = {"truncated": data[:-1], "joined to itself": data * 2, "an array left out": data[second:]}
    (directory / STATE).write_bytes(changed[change])
    if not has_checksums:
        (directory / "checksums.json").unlink()
    with pytest.raises(UserError, match=str(directory / STATE)):
        read_all(directory / STATE)


def test_files_without_checksums_load(golden, run):
    """Of the release; of older versions; under another name; beside the checksums of another file."""
    shutil.copy(golden / "lvm_tiny" / "final" / STATE, run / "checkpoints" / "step_00000003" / "other")
    assert read_all(run / "checkpoints" / "step_00000003" / "other")
    (run / "checkpoints" / "step_00000003" / "checksums.json").unlink()
    assert read_all(run / STATE)


@pytest.mark.parametrize("name", [STATE, f"{STATE}_3"])
def test_copies_of_links_are_verified(run, name, tmp_path_factory):
    """A copy of a state with its sidecars, as files."""
    copy = tmp_path_factory.mktemp("copy")
    suffix = name.removeprefix(STATE)
    for file in (name, f"checksums{suffix}.json"):
        shutil.copy(run / file, copy / file)
    assert read_all(copy / name)
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 128
    (copy / name).write_bytes(data)
    with pytest.raises(checkpoints.DamagedArrayError):
        read_all(copy / name)


@pytest.mark.parametrize("content", ["", "[", "[]", '{"file": "streaming_train_state"}', '{"a":' * 100_000])
def test_an_unreadable_table_is_named(run, content):
    table = run / "checkpoints" / "step_00000003" / "checksums.json"
    table.write_text(content)
    with pytest.raises(UserError, match=str(table)):
        read_all(run / STATE)


def test_type_and_shape_are_part_of_the_checksum():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    key = ("a", "b")
    variants = [array, array.reshape(3, 2), array.view(np.int32)]
    assert len({checksums.array_checksum(key, variant) for variant in variants}) == 3
    assert checksums.array_checksum(("a",), array) != checksums.array_checksum(key, array)


def test_the_table_is_readable(run):
    table = json.loads((run / "checksums.json").read_text())
    assert (table["algorithm"], table["file"]) == ("crc32", STATE)
    assert table["bytes"] == (run / STATE).stat().st_size
    assert table["arrays"].keys() == {"/".join(entry.key) for entry in streaming.read_streaming(run / STATE)}
