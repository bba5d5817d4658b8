"""Small damaged or hostile checkpoint files end in one line that names the file."""

import json
import re

import msgpack
import pytest

from EasyLM import checkpoints
from EasyLM.checkpoints import streaming
from EasyLM.checkpoints.safetensors_file import read_safetensors
from EasyLM.errors import UserError
from EasyLM.storage import read_torch_file


def array(dtype: str, shape=(2,), data=bytes(8)) -> msgpack.ExtType:
    """An array as flax packs it."""
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


def streaming_file(path, key, value) -> str:
    path.write_bytes(msgpack.packb([key, msgpack.packb(value)]))
    return str(path)


@pytest.mark.parametrize(
    "dtype",
    [
        "O",
        "object",
        "(2,",
        "f4,f4",
        "V99999999999999",
        "(((((((",
        "f" * 10_000,
        "",
        "float32\0",
        "{'names': 3}",
        "M8[Y]",
    ],
)
def test_hostile_names_of_types_are_refused(tmp_path, dtype):
    path = streaming_file(tmp_path / "state", ["params", "a"], array(dtype))
    with pytest.raises(UserError, match=re.escape(path) + ": params/a: .*unknown array type"):
        streaming.read_streaming(path)


@pytest.mark.parametrize("key", [[], [""], ["params", ""]])
def test_empty_names_are_refused(tmp_path, key):
    path = streaming_file(tmp_path / "state", key, array("float32"))
    with pytest.raises(UserError, match=rf"{re.escape(path)}: .*: an empty name"):
        checkpoints.open_checkpoint(f"params::{path}")


def test_a_deeply_nested_flax_file_is_refused(tmp_path):
    path = tmp_path / "params"
    path.write_bytes(b"\x81\xa1a" * 5000 + b"\xc0")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: .*more than 100 levels deep"):
        checkpoints.open_checkpoint(f"flax_params::{path}")


@pytest.mark.parametrize("read", [streaming.read_streaming, streaming.read_flax, read_safetensors, read_torch_file])
def test_a_pointer_of_git_lfs_is_named(tmp_path, read):
    path = tmp_path / "weights"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: is a pointer of Git LFS.*: run `git lfs pull`"):
        read(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step": ' + "[" * 100_000 + "}", "not JSON"),
        ('{"step": "3"}', "step must be an integer, not a text"),
        ('{"step": -1}', r"step=-1: must be 0\.\.2147483647"),
        ('{"step": 4294967296}', r"step=4294967296: must be 0\.\."),
        ('{"flags": []}', "flags must be an object, not a list"),
        ('{"llama_config": 3}', "llama_config must be an object"),
        ('{"started_from": ""}', "started_from must be a list, not a text"),
        ('{"started_from": [3]}', r"started_from\[0\] must be a text"),
        ("{", "not JSON"),
        ("\0" * 400, "not JSON"),  # after a loss of power
        ('{"step": 3, "save": []}', "save must be an object, not a list"),
        ('{"step": 3, "save": {"number": "9"}}', r"save\.number must be an integer, not a text"),
        ('{"step": 3, "save": {"milestone": 1}}', r"save\.milestone must be true or false, not an integer"),
        ('{"step": 3, "save": {"files": ["d/0a"]}}', r"save\.files must be an object, not a list"),
        ('{"step": 3, "save": {"files": {"d/0a": "7"}}}', r"save\.files\.d/0a must be an integer, not a text"),
    ],
)
def test_damaged_metadata_is_named(tmp_path, content, message):
    path = tmp_path / "metadata.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {message}"):
        checkpoints.load_metadata(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows_consumed": -8}, r"rows_consumed=-8: must be 0\.\."),
        ({"rows_consumed": 1.5}, "rows_consumed must be an integer"),
        ({"rows_consumed": 8, "source": "x"}, "source must be an object"),
        ({"total_tokens": None}, "total_tokens must be an integer, not null"),
    ],
)
def test_a_damaged_data_state_is_named(tmp_path, content, message):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {message}"):
        checkpoints.load_dataset_state(str(path))


def test_a_data_state_may_have_other_keys(tmp_path):
    """The limits of a step do not apply to a key of this name in a data state."""
    path = tmp_path / "dataset.json"
    state = {"rows_consumed": 8, "source": {}, "step": {}}
    path.write_text(json.dumps(state))
    assert checkpoints.load_dataset_state(str(path)) == state
