"""Estimates of the seconds of a step and of a save, from the rates of devices, networks and disks."""

import dataclasses
import os
from typing import Any

from EasyLM.checkpoints import DISK_GB_PER_SECOND, HOST_GB_PER_SECOND, save_seconds
from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.parallel import SHARE_VARIABLES, host_memory
from EasyLM.planning.collectives import Communication
from EasyLM.planning.hardware import Hardware, hardware_of
from EasyLM.planning.topologies import Topology
from EasyLM.training import peak_flops

_DEFAULT = "0: the data sheet's"
ASSUMPTION_FLAGS = {
    "hbm_gb": Flag(
        0.0,
        f"Memory of a device that JAX may use, in GB (1e9 bytes); {_DEFAULT}, for GPUs the share "
        f"{SHARE_VARIABLES[0]} of it (0.75, as in JAX), for CPUs a share of this machine's.",
        least=0,
    ),
    "hbm_gb_per_second": Flag(0.0, f"GB/s between a device and its memory; {_DEFAULT}.", least=0),
    "link_gb_per_second": Flag(0.0, f"GB/s of a device to its slice or node, in one direction; {_DEFAULT}.", least=0),
    "network_gb_per_second": Flag(0.0, f"GB/s of a device to other slices or nodes; {_DEFAULT}.", least=0),
    "matmul_efficiency": Flag(0.7, "Share of the peak FLOP/s that matrix products reach.", above=0, most=1),
    "host_gb_per_second": Flag(
        HOST_GB_PER_SECOND,
        "GB/s at which a process copies its share of a checkpoint to host memory.",
        above=0,
    ),
    "disk_gb_per_second": Flag(DISK_GB_PER_SECOND, "GB/s at which all processes together write a checkpoint.", above=0),
}
_GB = 1e9
# Nominal values of a virtual CPU device, so that plans can be compared. Give the flags for a real estimate.
_CPU_TFLOPS, _CPU_MEMORY_RATE, _CPU_LINK_RATE = 0.1, 10.0, 5.0


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """The values of ASSUMPTION_FLAGS, and the peak of a device. Those of the data sheet replace zeros."""

    hbm_gb: float
    hbm_gb_per_second: float
    link_gb_per_second: float
    network_gb_per_second: float
    matmul_efficiency: float
    host_gb_per_second: float
    disk_gb_per_second: float
    peak_tflops: float

    @classmethod
    def of(cls, config: Any, topology: Topology) -> "Assumptions":
        """Returns the assumptions for the devices of a topology.

        Args:
          config: values of ASSUMPTION_FLAGS and of `peak_tflops`.
        """
        given = {field.name: config[field.name] for field in dataclasses.fields(cls)}
        sheet = hardware_of(topology.device_kind) or _cpu(len(topology.devices))
        peak = peak_flops(config.peak_tflops, topology.device_kind) or _CPU_TFLOPS * 1e12
        defaults = {
            "hbm_gb": sheet.memory_gb * _usable_share(topology.platform),
            "hbm_gb_per_second": sheet.memory_rate,
            "link_gb_per_second": sheet.link_rate,
            "network_gb_per_second": sheet.network_rate,
        }
        given |= {name: given[name] or value for name, value in defaults.items()}
        return cls(**given | {"peak_tflops": peak / 1e12})

    def step_seconds(self, matmul_flops: float, state_bytes: int, communication: Communication) -> float:
        """Estimates the seconds of a step. Communication overlaps with computation.

        The time of elementwise operations is that of one pass over the state: read and written.

        Args:
          matmul_flops: FLOPs of the matrix products of one device.
          state_bytes: bytes of the train state of one device.
        """
        compute = matmul_flops / (self.peak_tflops * 1e12 * self.matmul_efficiency)
        update = 2 * state_bytes / (self.hbm_gb_per_second * _GB)
        networks = (communication.within, self.link_gb_per_second), (communication.across, self.network_gb_per_second)
        # An all-reduce sends its array twice: it scatters the sums and gathers them.
        seconds = [(sum(sent.values()) + sent["all-reduce"]) / (rate * _GB) for sent, rate in networks]
        return max(compute + update, sum(seconds))

    def save_seconds(self, file_bytes: int, host_bytes: int) -> float:
        """Estimates the seconds until a checkpoint is on disk; see `checkpoints.save_seconds`."""
        return save_seconds(file_bytes, host_bytes, self.host_gb_per_second, self.disk_gb_per_second)


def _usable_share(platform: str) -> float:
    """Returns the share of a device's memory that JAX uses.

    Raises:
      UserError: if the variable of the environment is not a share, or is set under both names.
    """
    if platform != "cuda":
        return 1.0
    given = {name: os.environ[name] for name in SHARE_VARIABLES if os.environ.get(name)}
    if len(given) > 1:
        texts = " ".join(f"{name}={text}" for name, text in given.items())
        raise UserError(
            f"{texts}: two names of one setting, which JAX refuses: unset {SHARE_VARIABLES[1]}, the older one"
        )
    name, text = next(iter(given.items()), (SHARE_VARIABLES[0], "0.75"))
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"{name}={text}: must be above 0 and at most 1")
    return share


def _cpu(devices: int) -> Hardware:
    """Returns nominal values of one of several virtual CPU devices, which share the memory of this machine."""
    return Hardware(host_memory() / _GB / devices, _CPU_MEMORY_RATE, _CPU_LINK_RATE, _CPU_LINK_RATE)
