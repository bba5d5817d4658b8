"""Devices of a topology, which need not exist on this machine."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies

from EasyLM.errors import UserError, check_installed

# The kind of a TPU -> the slices that users can get, the last one a whole pod. v4 and v5p also have slices of other
# multiples of four along each axis. Sources: https://docs.cloud.google.com/tpu/docs (pages v4, v5e, v5p and v6e).
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_TPU_SLICES = {
    "v4": (*_CUBIC, "16x16x16"),
    "v5e": _FLAT,
    "v5p": (*_CUBIC, "16x16x16", "16x20x28"),
    "v6e": _FLAT,
}
# The chips of a host, where they are not the four of libtpu's default: a slice of one chip, and the eight of v5e and
# v6e, which Cloud TPU gives to one host.
_TPU_HOSTS = {"1x1": [1, 1, 1], "2x4": [2, 4, 1]}
FORMS = "v4:2x2x1, v5e:1x1, v5e:4x4, v5p:2x2x2, v6e:4x4 (chips), h100:8, h100:8x8 (nodes x GPUs), cpu:8"
_MOST_CPUS = 1024  # a larger number takes minutes, and shows nothing that fewer devices do not
_NODE_GPUS = 8  # of an H100 SXM node, connected by NVLink
# The description with which XLA compiles for an H100 SXM. Source: h100_sxm.txtpb in XLA's tools/hlo_opt/gpu_specs.
_H100 = """gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices, and where they are.

    Attributes:
      devices: they have the attributes of a `jax.Device`, and may exist for the compiler only.
      platform: the platform that XLA compiles for: "tpu", "cuda" or "cpu".
      device_kind: the kind of the devices, as in `hardware`.
    """

    devices: Sequence[Any]
    platform: str
    device_kind: str

    @property
    def num_processes(self) -> int:
        """Number of processes, one per host."""
        return len({device.process_index for device in self.devices})

    def island_of(self, device: Any) -> int:
        """Returns the slice or node of a device, inside which the network is fast."""
        # The devices of a single slice do not have the attribute.
        return getattr(device, "slice_index", 0) if self.platform == "tpu" else device.process_index


def make_topology(text: str, num_slices: int = 1) -> Topology:
    """Returns the devices of `--topology`. Call it before any other use of JAX; it selects the CPU backend.

    Args:
      text: KIND:SIZES, such as `v5p:2x2x2` (chips along the axes), `h100:8x8` (nodes x GPUs) or `cpu:8`.
      num_slices: number of such slices, for TPUs.

    Raises:
      UserError: if the text is invalid, XLA knows no such topology, or a package is not installed.
    """
    flag = f"--topology={text}"
    kind, _, sizes = text.partition(":")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or kind not in (*_TPU_SLICES, "h100", "cpu"):
        raise UserError(f"{flag}: must be KIND:SIZES, for example {FORMS}")
    if num_slices > 1 and kind not in _TPU_SLICES:
        raise UserError(
            f"--num_slices={num_slices}: only TPUs have slices; for GPUs, give nodes x GPUs, such as h100:8x8"
        )
    jax.config.update("jax_platforms", "cpu")  # a GPU or TPU of this machine is not used
    shape = [int(size) for size in sizes.split("x")]
    if kind == "cpu":
        return _cpus(flag, shape)
    if kind == "h100":
        return _gpus(flag, shape)
    return _tpus(flag, kind, sizes, num_slices)


def _cpus(flag: str, shape: list[int]) -> Topology:
    if len(shape) != 1 or shape[0] > _MOST_CPUS:
        raise UserError(f"{flag}: must be cpu:N, with N devices, at most {_MOST_CPUS}")
    with contextlib.suppress(RuntimeError):  # JAX has started, perhaps with enough devices
        jax.config.update("jax_num_cpu_devices", shape[0])
    devices = jax.devices("cpu")
    if len(devices) < shape[0]:
        raise UserError(f"{flag}: JAX has already started, with {len(devices)} CPU devices")
    return Topology(devices[: shape[0]], "cpu", "cpu")


def _tpus(flag: str, kind: str, sizes: str, num_slices: int) -> Topology:
    names = _TPU_SLICES[kind]
    nearest = next((name for name in names if _chips(name) >= _chips(sizes)), names[-1])
    remedy = f"the nearest slice is {kind}:{nearest}"
    axes = [int(size) for size in sizes.split("x")]
    is_cubic = names is not _FLAT and len(axes) == 3 and all(size % 4 == 0 for size in axes)
    # libtpu accepts others too, as if v5e had a third axis and pods no limit.
    if sizes not in names and not (is_cubic and _chips(sizes) <= _chips(names[-1])):
        raise UserError(f"{flag}: no such topology; {remedy}")
    check_installed(flag, "tpu", "libtpu")
    # No chip is requested, so another process may use libtpu too. The other variables replace queries to a TPU host.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ.update(TPU_ACCELERATOR_TYPE=f"{kind}-8", TPU_WORKER_HOSTNAMES="localhost")
    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # each device has both cores of a chip
    if sizes in _TPU_HOSTS:
        options["chips_per_host_bounds"] = _TPU_HOSTS[sizes]
    try:
        devices: list[Any] = topologies.get_topology_desc(f"{kind}:{sizes}", "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(f"{flag}: no such topology: {str(error).splitlines()[0]}; {remedy}") from None
    return Topology(devices, "tpu", devices[0].device_kind)


def _chips(sizes: str) -> int:
    """Returns the number of chips of a slice, such as 16 for 4x4."""
    return math.prod(map(int, sizes.split("x")))


def _gpus(flag: str, shape: list[int]) -> Topology:
    if len(shape) > 2:
        raise UserError(f"{flag}: must be h100:GPUS or h100:NODESxGPUS")
    nodes, gpus = (1, *shape)[-2:]
    if gpus > _NODE_GPUS:
        enough = -(-nodes * gpus // _NODE_GPUS)
        raise UserError(f"{flag}: a node has at most {_NODE_GPUS} GPUs; give h100:{enough}x{_NODE_GPUS}")
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        check_installed(flag, "gpu", "jax_cuda13_plugin")
    devices = topologies.get_topology_desc("", "cuda", topology=f"1x{nodes}x{gpus}", target_config=_H100).devices
    return Topology(devices, "cuda", "NVIDIA H100 80GB HBM3")


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Lets JAX lower for GPUs without a GPU. Otherwise JAX needs a backend of the name "gpu" (JAX issue 23971)."""
    if platform != "cuda":
        yield
        return
    target = "jax._src.xla_bridge.canonicalize_platform"
    with mock.patch(target, lambda name: "cuda" if name == "gpu" else name):
        yield
