"""Devices of a topology, which need not exist on this machine."""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies

from EasyLM.errors import UserError, check_installed

# The kind of a TPU -> options of its topology. Each device of a v4 has both cores of a chip.
_TPU_OPTIONS: dict[str, dict[str, str]] = {
    "v4": {"chip_config_name": "megacore"},
    "v5e": {},
    "v5p": {},
    "v6e": {},
}
FORMS = "v4:2x2x1, v5e:4x4, v5p:2x2x2, v6e:4x4 (chips), h100:8, h100:8x8 (nodes x GPUs), cpu:8"
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
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or kind not in (*_TPU_OPTIONS, "h100", "cpu"):
        raise UserError(f"{flag}: must be KIND:SIZES, for example {FORMS}")
    if num_slices > 1 and kind not in _TPU_OPTIONS:
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
    if len(shape) != 1:
        raise UserError(f"{flag}: must be cpu:N, the number of devices")
    with contextlib.suppress(RuntimeError):  # JAX has started, perhaps with enough devices
        jax.config.update("jax_num_cpu_devices", shape[0])
    devices = jax.devices("cpu")
    if len(devices) < shape[0]:
        raise UserError(f"{flag}: JAX has already started, with {len(devices)} CPU devices")
    return Topology(devices[: shape[0]], "cpu", "cpu")


def _tpus(flag: str, kind: str, sizes: str, num_slices: int) -> Topology:
    check_installed(flag, "tpu", "libtpu")
    # No chip is requested, so another process may use libtpu too. The other variables replace queries to a TPU host.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ.update(TPU_ACCELERATOR_TYPE=f"{kind}-8", TPU_WORKER_HOSTNAMES="localhost")
    options = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        devices: list[Any] = topologies.get_topology_desc(
            f"{kind}:{sizes}", "tpu", **options, **_TPU_OPTIONS[kind]
        ).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(f"{flag}: no such topology: {str(error).splitlines()[0]}") from None
    return Topology(devices, "tpu", devices[0].device_kind)


def _gpus(flag: str, shape: list[int]) -> Topology:
    if len(shape) > 2:
        raise UserError(f"{flag}: must be h100:GPUS or h100:NODESxGPUS")
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        check_installed(flag, "gpu", "jax_cuda13_plugin")
    nodes, gpus = (1, *shape)[-2:]
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
