"""The byte format equals that of flax and of the LVM release; invalid files fail with a one-line error."""

import io

import flax.serialization
import fsspec
import ml_dtypes
import msgpack
import numpy as np
import pytest

from EasyLM.checkpoints import msgpack_arrays, streaming
from EasyLM.errors import UserError

STREAMING = ["init/streaming_train_state", "step15/streaming_train_state", "final/streaming_train_state"]


@pytest.mark.parametrize("name", [*STREAMING, "streaming_params_bf16"])
def test_golden_files_are_rewritten_to_the_same_bytes(golden, name):
    path, out = golden / "lvm_tiny" / name, io.BytesIO()
    for entry in streaming.read_streaming(path):
        streaming.write_entry(out, entry.key, entry.read())
    assert out.getvalue() == path.read_bytes()


def test_golden_flax_file_is_rewritten_to_the_same_bytes(golden):
    path, out = golden / "lvm_tiny" / "flax_params.msgpack", io.BytesIO()
    streaming.write_flax(out, streaming.read_flax(path))
    assert out.getvalue() == path.read_bytes()


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.float64, np.uint16, ml_dtypes.bfloat16, bool])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5, 3), (256,), (70, 1000)])
def test_entries_equal_flax(tmp_path, dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    expected = msgpack.packb((("a", "ä"), flax.serialization.to_bytes(array)))
    with open(tmp_path / "file", "wb") as file:
        streaming.write_entry(file, ("a", "ä"), array)
    assert (tmp_path / "file").read_bytes() == expected
    (entry,) = streaming.read_streaming(tmp_path / "file")
    assert (entry.key, entry.shape, entry.dtype) == (("a", "ä"), shape, np.dtype(dtype))
    np.testing.assert_array_equal(entry.read(), array)


@pytest.mark.parametrize("limit", [8, 60, 100])
def test_chunks_of_large_arrays_equal_flax(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", limit)
    monkeypatch.setattr(msgpack_arrays, "MAX_CHUNK_BYTES", limit)
    arrays = {"a": np.arange(5 * 7, dtype=np.float32).reshape(5, 7), "b": np.ones(3, ml_dtypes.bfloat16)}
    stream, plain = tmp_path / "stream", tmp_path / "plain"
    stream.write_bytes(b"".join(msgpack.packb(((k,), flax.serialization.to_bytes(v))) for k, v in arrays.items()))
    plain.write_bytes(flax.serialization.msgpack_serialize({"x": dict(arrays)}))
    for path, read in ((stream, streaming.read_streaming), (plain, streaming.read_flax)):
        entries = read(path)
        for entry in entries:
            np.testing.assert_array_equal(entry.read(), arrays[entry.key[-1]])
        out = io.BytesIO()
        if path == plain:
            streaming.write_flax(out, entries)
        else:
            for entry in entries:
                streaming.write_entry(out, entry.key, entry.read())
        assert out.getvalue() == path.read_bytes()


def test_rows_written_in_any_order_make_the_same_file(monkeypatch):
    monkeypatch.setattr(msgpack_arrays, "MAX_CHUNK_BYTES", 64)  # a chunk ends within a row
    arrays = [np.arange(7 * 6, dtype=np.float32).reshape(7, 6), np.array(1.0), np.ones((0, 2))]
    whole, parts, places = io.BytesIO(), io.BytesIO(), []
    for i, array in enumerate(arrays):
        places.append(streaming.entry_layout((f"{i}",), array.shape, array.dtype, places[-1].end if places else 0))
        streaming.write_entry(whole, (f"{i}",), array)
    for place, array in reversed(list(zip(places, arrays, strict=True))):
        for start, stop in ((6, 7), (2, 6), (0, 2)) if array.shape == (7, 6) else ((0, 1),):
            streaming.write_rows(parts, place, start, array[start:stop] if array.ndim else array)
    assert parts.getvalue() == whole.getvalue()


def test_read_into_fills_the_callers_memory(golden):
    entry = streaming.read_streaming(golden / "lvm_tiny" / "final" / "streaming_train_state")[1]
    buffer = np.full((3, *entry.shape), np.nan, entry.dtype)
    entry.read_into(buffer[1])
    np.testing.assert_array_equal(buffer[1], entry.read())
    assert np.isnan(buffer[[0, 2]]).all()


def test_truncated_files_are_rejected_with_the_offset(tmp_path):
    whole, ends = io.BytesIO(), []
    for i in range(3):
        streaming.write_entry(whole, ("layer", str(i)), np.ones((2, 3), np.float32))
        ends.append(whole.tell())
    path = tmp_path / "cut"
    for size in range(1, ends[-1]):
        path.write_bytes(whole.getvalue()[:size])
        if size in ends:  # a valid shorter file; loading reports the missing names
            assert len(streaming.read_streaming(path)) == ends.index(size) + 1
            continue
        with pytest.raises(UserError, match=rf"{path}: .*byte \d+: .*truncated") as caught:
            streaming.read_streaming(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole.getvalue()[: ends[0] + 40])
    with pytest.raises(UserError, match="layer/1"):
        streaming.read_streaming(path)


@pytest.mark.parametrize("read", [streaming.read_streaming, streaming.read_flax])
def test_damaged_files_raise_only_user_errors(tmp_path, golden, read):
    name = "flax_params.msgpack" if read is streaming.read_flax else "final/streaming_train_state"
    data = np.frombuffer((golden / "lvm_tiny" / name).read_bytes()[:140_000], np.uint8)
    rng, path, refused = np.random.default_rng(0), tmp_path / "damaged", 0
    for _ in range(200):
        damaged = data.copy()
        damaged[rng.integers(0, 60, 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            [entry.key for entry in read(path)]
        except UserError:
            refused += 1
    assert refused == 200  # the cut at 140,000 bytes is seen, if nothing else is


def test_object_arrays_are_rejected(tmp_path):
    """NumPy would interpret their bytes as addresses."""
    value = msgpack.packb((("a",), msgpack.packb(msgpack.ExtType(1, msgpack.packb(((1,), "object", bytes(8)))))))
    (tmp_path / "file").write_bytes(value)
    with pytest.raises(UserError, match="unknown array type 'object'"):
        streaming.read_streaming(tmp_path / "file")


def test_remote_files_are_read_and_written():
    array = np.arange(1000, dtype=np.float32)
    with fsspec.open("memory://bucket/file", "wb") as file:
        streaming.write_entry(file, ("a",), array)
        streaming.write_entry(file, ("b",), array + 1)
    entries = streaming.read_streaming("memory://bucket/file")
    np.testing.assert_array_equal(entries[1].read(), array + 1)
