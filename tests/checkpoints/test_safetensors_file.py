"""Safetensors files: other programs read them, and damage of any kind is found."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from EasyLM.checkpoints.checksums import DamagedArrayError
from EasyLM.checkpoints.safetensors_file import read_safetensors, tensor_entry, write_safetensors
from EasyLM.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.bias": np.arange(5, dtype=np.int64),
    "scalar": np.array(3, np.float16),
    "none": np.zeros((0, 4), np.float32),
}


def read(path) -> dict[str, np.ndarray]:
    return {tensor.key[0]: tensor.read() for tensor in read_safetensors(path)}


def assert_same(tensors) -> None:
    assert tensors.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)


@pytest.fixture
def path(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        write_safetensors(file, [tensor_entry(name, array) for name, array in TENSORS.items()])
    return tmp_path / "model.safetensors"


def test_other_programs_read_our_files(path):
    assert_same(read(path))
    assert_same(load_file(path))


def test_files_of_other_programs_load_without_checksums(path):
    save_file(TENSORS, path, {"format": "pt"})
    assert_same(read(path))


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer/pretrained/model",
        "evaluation/demo_model/model-00001-of-00002",
        "evaluation/demo_model/model-00002-of-00002",
    ],
)
def test_the_shipped_weights_have_checksums(path, name):
    data = bytearray((ROOT / f"{name}.safetensors").read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedArrayError):
        read(path)


def test_every_flipped_bit_is_found(path):
    """The file is refused, or its content is the same."""
    data = path.read_bytes()
    refused, bits = 0, range(0, 8 * len(data), 3)
    for bit in bits:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            tensors = read(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert_same(tensors)  # a flip in the metadata
    assert refused > 0.8 * len(bits)


def test_checksums_under_a_damaged_key_are_found(path):
    """Otherwise the file would load without verification, as those of other programs."""
    data = path.read_bytes()
    for start in range(data.index(b"checksums"), data.index(b"checksums") + len("checksums")):
        for mark in (b"", b"algorithm", b"crc32", b"arrays"):  # a second damage
            damaged = bytearray(data)
            damaged[start] ^= 1
            damaged[-1] ^= 1
            if mark:
                damaged[data.index(mark)] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{path}: not a complete safetensors file .* instead of 'checksums'"):
                read(path)


def test_the_damaged_tensor_is_named(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedArrayError, match=f"{path}: the array scalar is damaged"):
        read(path)


CHANGES = {
    "joined to itself": lambda data: data + data,
    "a byte more": lambda data: data + b"\0",
    "a byte less": lambda data: data[:-1],
    "header alone": lambda data: data[:40],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ours", [True, False])
def test_a_file_of_another_length_is_refused(path, ours, change):
    if not ours:
        save_file(TENSORS, path)
    path.write_bytes(CHANGES[change](path.read_bytes()))
    with pytest.raises(UserError, match=f"{path}: not a complete safetensors file"):
        read(path)


INFO = {"dtype": "U8", "shape": [2]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": INFO | {"data_offsets": [0, 2]}, "b": INFO | {"data_offsets": [1, 3]}},
        {"a": INFO | {"data_offsets": [0, 2]}, "b": INFO | {"data_offsets": [2, 4]}},
        {"a": INFO | {"data_offsets": [1, 3]}},
        '{"a": %s, "a": %s}' % ((json.dumps(INFO | {"data_offsets": [0, 2]}),) * 2),
        {"a": INFO | {"data_offsets": [0, 2]}, "__metadata__": {"checksums": "{"}},
        {"a": INFO | {"data_offsets": [0, 2]}, "__metadata__": {"checksums": '{"algorithm": "md5", "arrays": {}}'}},
        {"a": INFO | {"data_offsets": [0, 2]}, "__metadata__": {"checksums": '{"algorithm": "crc32", "arrays": {}}'}},
    ],
)
def test_bad_headers_are_refused(path, header):
    """Overlaps, gaps, repeated keys, unreadable checksums, checksums of other tensors. The file has 3 bytes of data."""
    data = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(3))
    with pytest.raises(UserError, match=f"{path}: not a complete safetensors file"):
        read(path)


def test_an_unsupported_type_is_no_damage(path):
    header = json.dumps({"a": INFO | {"dtype": "F8_E4M3", "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(UserError, match=rf"^{path}: a is F8_E4M3; supported are F64, F32, F16, BF16, BOOL, I8"):
        read_safetensors(path)
