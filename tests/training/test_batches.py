"""Global batches on the mesh: order, the rows of each process, prefetch, errors."""

import time

import jax
import numpy as np
import pytest
from data_kit import assert_rows, copy_golden, dataset, plain_rows, plain_stream
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from EasyLM.errors import UserError
from EasyLM.training import batches


class CountingRows:
    """A row source whose rows hold their number. `requests` are the calls of `rows`."""

    def __init__(self, fails_at=10**9):
        self.requests, self._fails_at = [], fails_at

    def rows(self, start, count):
        self.requests.append((start, count))
        if start >= self._fails_at:
            raise UserError("the disk is gone")
        return {"images": np.arange(start, start + count)[:, None, None] + np.zeros((1, 2, 3))}


def mesh(shape, devices=None):
    return Mesh(np.array(devices or jax.devices()).reshape(shape), ("dp", "fsdp", "mp"))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 2, 4), (2, 2, 2), (1, 1, 8)])
def test_global_batches_in_order(shape):
    source = CountingRows()
    sharding = NamedSharding(mesh(shape), P(("dp", "fsdp")))
    stream = batches.Batches(source, 16, sharding, start_row=3)
    try:
        for number in range(4):
            assert stream.position == 3 + 16 * number
            batch = next(stream)["images"]
            np.testing.assert_array_equal(batch[:, 1, 2], np.arange(3 + 16 * number, 19 + 16 * number))
            assert batch.sharding == sharding
        assert stream.wait_seconds >= 0
    finally:
        stream.close()


def test_a_process_with_several_ranges_of_rows(monkeypatch):
    source = CountingRows()
    monkeypatch.setattr(batches, "_local_ranges", lambda size, sharding: [(0, 4), (4, 10), (10, 16)])
    stream = batches.Batches(source, 16, NamedSharding(mesh((8, 1, 1)), P("dp")))
    np.testing.assert_array_equal(next(stream)["images"][:, 0, 0], np.arange(16))
    stream.close()
    assert source.requests[:3] == [(0, 4), (4, 6), (10, 6)]


def test_tokens_may_be_sharded_along_the_sequence(golden, tmp_path):
    sentences = copy_golden(golden, tmp_path)
    source = dataset(sentences)
    stream = batches.Batches(source, 4, NamedSharding(mesh((2, 2, 2)), P("dp", "mp")), 9)
    assert_rows(next(stream), *plain_rows(plain_stream(sentences), 128, 9, 4))
    stream.close()


def test_a_process_reads_only_its_rows(monkeypatch):
    devices = jax.devices()
    sharding = NamedSharding(mesh((4, 1, 2), devices), P(("dp", "fsdp")))
    assert batches._local_ranges(16, sharding) == [(0, 16)]
    all_devices = NamedSharding.addressable_devices_indices_map

    def of_two_hosts(self, shape):  # this process has the devices of dp 0 and 2
        return {device: index for device, index in all_devices(self, shape).items() if device.id in (0, 1, 4, 5)}

    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", of_two_hosts)
    assert batches._local_ranges(16, sharding) == [(0, 4), (8, 12)]


def test_prefetch_is_bounded():
    source = CountingRows()
    stream = batches.Batches(source, 8, NamedSharding(mesh((8, 1, 1)), P("dp")))
    next(stream)
    deadline = time.monotonic() + 60
    while len(source.requests) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source.requests == [(0, 8), (8, 8), (16, 8), (24, 8)]  # one yielded, two ready, one waiting for space
    assert stream.position == 8
    stream.close()
    assert not stream._thread.is_alive()


def test_errors_are_raised_in_the_consumer():
    stream = batches.Batches(CountingRows(fails_at=8), 8, NamedSharding(mesh((8, 1, 1)), P("dp")))
    next(stream)
    for _ in range(2):
        with pytest.raises(UserError, match="the disk is gone"):
            next(stream)
    assert stream.position == 8
    stream.close()
