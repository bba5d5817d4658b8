"""The order of devices in meshes of TPU slices, and meshes that split a physical axis."""

import itertools
import logging
import types

import numpy as np
import pytest

from EasyLM.errors import UserError
from EasyLM.parallel.mesh import _device_array, parse_mesh_dim


def chips(kind: str, sizes: tuple[int, ...], slices: int = 1) -> list[types.SimpleNamespace]:
    """TPU devices, x fastest. `sizes` are those of the axes x, y, z."""
    axes = [range(size) for size in reversed((*sizes, 1, 1)[:3])]
    return [
        types.SimpleNamespace(
            platform="tpu", device_kind=kind, coords=coords[::-1], core_on_chip=0, slice_index=index, id=number
        )
        for index in range(slices)
        for number, coords in enumerate(itertools.product(*axes))
    ]


def mesh_shapes(count: int) -> list[dict[str, int]]:
    sizes = [size for size in range(1, count + 1) if count % size == 0]
    return [
        {"dp": dp, "fsdp": count // (dp * mp * sp), "mp": mp, "sp": sp}
        for dp in sizes
        for mp in sizes
        for sp in (1, 2, 8)
        if count % (dp * mp * sp) == 0
    ]


@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize(
    "kind, sizes",
    [
        ("TPU v5 lite", (4, 4)),
        ("TPU v6 lite", (4, 4)),
        ("TPU v5p", (2, 2, 2)),
        ("TPU v5p", (4, 4, 4)),
        ("TPU v4", (2, 2, 4)),
    ],
)
def test_every_mesh_builds_or_is_refused_with_one_that_builds(kind, sizes, slices):
    devices = chips(kind, sizes, slices)
    refused = 0
    for shape in mesh_shapes(len(devices)):
        text = ",".join(f"{axis}:{size}" for axis, size in shape.items())
        try:
            array = _device_array(text, shape, devices)
        except UserError as error:
            refused += 1
            assert slices > 1 and shape["dp"] * shape["fsdp"] % slices != 0
            repaired = parse_mesh_dim(str(error).rpartition("--mesh_dim=")[2], len(devices))
            array = _device_array("", repaired, devices)
            shape = repaired
        assert array.shape == tuple(shape.values()) and len({id(device) for device in array.flat}) == len(devices)
        # Devices that differ only in mp and sp are in one slice: these axes communicate the most.
        slice_of = np.vectorize(lambda device: device.slice_index)(array)
        assert (slice_of == slice_of[..., :1, :1]).all()
    assert (refused > 0) == (slices > 1)


def test_slices_are_split_over_dp_before_fsdp():
    array = _device_array("2,16,2", {"dp": 2, "fsdp": 16, "mp": 2, "sp": 1}, chips("TPU v5 lite", (4, 4), 4))
    slice_of = np.vectorize(lambda device: device.slice_index)(array)
    assert (slice_of[0] < 2).all() and (slice_of[1] >= 2).all()
    assert [len(set(part.flat)) for part in slice_of[0].reshape(2, -1)] == [1, 1], "each half of fsdp is a slice"


@pytest.mark.parametrize("text, logged", [("2,8,1", True), ("!2,8,1", False), ("4,4,1", False)])
def test_a_split_physical_axis_is_logged_unless_it_is_asked_for(caplog, text, logged):
    dp, fsdp, mp = map(int, text.removeprefix("!").split(","))
    with caplog.at_level(logging.INFO):
        _device_array(text, {"dp": dp, "fsdp": fsdp, "mp": mp, "sp": 1}, chips("TPU v5 lite", (4, 4)))
    assert (f"--mesh_dim={text}: a physical axis of the network is split" in caplog.text) == logged
