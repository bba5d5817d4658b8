"""Data sheet values of devices, from which estimates follow. bf16 FLOP/s are in `EasyLM.training.throughput`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Values of one device. Rates are in one direction, in GB/s, 1 GB = 1e9 bytes.

    Attributes:
      memory_gb: memory of the device.
      memory_rate: between the device and its memory.
      link_rate: to the other devices of the slice or node, over all links.
      network_rate: to other slices or nodes: the share of one device in the network of its host.
    """

    memory_gb: float
    memory_rate: float
    link_rate: float
    network_rate: float


# By a part of `device_kind`. Sources: https://docs.cloud.google.com/tpu/docs (pages v4, v5e, v5p and v6e), and NVIDIA's
# data sheet of the H100 SXM, with one network adapter of 400 Gb/s per GPU. The memory of TPUs is what XLA plans with.
HARDWARE = {
    "TPU v4": Hardware(33.0, 1228, 300, 6.25),
    "TPU v5 lite": Hardware(16.9, 819, 200, 3.1),
    "TPU v5p": (_V5P := Hardware(102.8, 2765, 600, 6.25)),
    "TPU v5": _V5P,
    "TPU v6 lite": Hardware(33.6, 1640, 400, 12.5),
    "H100": Hardware(85.0, 3350, 450, 50),
}


def hardware_of(device_kind: str) -> Hardware | None:
    """Returns the values of a kind of device, or None."""
    return next((values for part, values in HARDWARE.items() if part in device_kind), None)
