"""The communication of a compiled step: bytes by kind of operation and by network."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from EasyLM.planning.hlo import Instruction

OPERATIONS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2, "f8e4m3fn": 1, "f8e5m2": 1}  # other types end with their bits
_OPERATION = re.compile(rf"({'|'.join(OPERATIONS)})(-start)?")
# Between TPU slices, a collective operation is a transfer by the hosts, which has its name.
_TRANSFER = re.compile(rf'_xla_host_transfer_rendezvous="({"|".join(OPERATIONS)})')
# In the fusion that starts an asynchronous operation on TPUs.
_FUSED_START = 'custom_call_target="AsyncCollectiveStart"'
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
# As mesh['a'=4,'b'=16], device_ids=([16,4]T(1,0)) {'b'}: reordered devices in the shape of a mesh, along some axes.
_ALONG_AXES = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_COMPUTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclasses.dataclass(frozen=True)
class Communication:
    """Bytes that a device sends or receives in one step, by operation.

    A gather and a scatter count their larger side, an all-reduce its array once.

    Attributes:
      within: over the fast network of a slice or node.
      across: over the network between slices or nodes.
    """

    within: dict[str, int]
    across: dict[str, int]

    @property
    def total(self) -> dict[str, int]:
        """Bytes over both networks."""
        return {name: self.within[name] + self.across[name] for name in OPERATIONS}


def communication(executed: Sequence[tuple[float, Instruction]], island_of: Sequence[int]) -> Communication:
    """Counts the collective operations of a step.

    Args:
      executed: see `hlo.executed_instructions`.
      island_of: the slice or node of each device, in the order of the mesh.
    """
    within, across = dict.fromkeys(OPERATIONS, 0.0), dict.fromkeys(OPERATIONS, 0.0)
    # The fusions that start, accompany and end an asynchronous operation all show it, with one channel. Those that
    # accompany it can be in a loop, which makes many trips during one operation. It counts where it starts.
    starts = {instruction.fused for _, instruction in executed if _FUSED_START in instruction.rest} - {""}
    started = {_channel(instruction) for _, instruction in executed if instruction.fused in starts} - {""}
    for times, instruction in executed:
        if instruction.operation in ("send", "recv") and (transfer := _TRANSFER.search(instruction.rest)):
            if instruction.operation == ("recv" if transfer[1] == "all-gather" else "send"):  # the larger side
                across[transfer[1]] += times * _array_bytes(*_arrays(instruction.type)[0])
            continue
        match = _OPERATION.fullmatch(instruction.operation)
        if not match or (instruction.fused and instruction.fused not in starts and _channel(instruction) in started):
            continue
        groups = _groups(instruction.rest, len(island_of))
        crosses = any(len({island_of[device] for device in group}) > 1 for group in groups)
        if any(len(group) > 1 for group in groups):
            # On TPUs, a fusion of this name is a reduce-scatter: it does not send the sums that it drops.
            scatters = instruction.fused.startswith("all-reduce-scatter")
            operation = "reduce-scatter" if scatters else match[1]
            (across if crosses else within)[operation] += times * _bytes(instruction)
    return Communication(*({name: round(size) for name, size in part.items()} for part in (within, across)))


def _channel(instruction: Instruction) -> str:
    """Returns the channel of an operation; empty if it has none."""
    match = _CHANNEL.search(instruction.rest)
    return match[1] if match else ""


def _bytes(instruction: Instruction) -> int:
    """Returns the bytes of the larger side of an operation."""
    # The result of a start holds the inputs, and for some operations two scalars for internal use.
    results = re.sub(r"u32\[\]", "", instruction.type)
    sides = [sum(_array_bytes(*array) for array in _arrays(side)) for side in (results, instruction.inputs)]
    if instruction.operation.endswith("-start") and not instruction.operation.startswith("all-reduce"):
        sides[0] -= sides[1]
    return max(sides)


def _arrays(types: str) -> list[tuple[str, str]]:
    """Returns the type and the dimensions of each array in the text of a type."""
    return _ARRAY.findall(types)


def _array_bytes(dtype: str, dimensions: str) -> int:
    bits = re.search(r"\d+$", dtype)
    itemsize = _BYTES.get(dtype) or (int(bits[0]) / 8 if bits else 0)
    return int(itemsize * math.prod(map(int, filter(None, dimensions.split(",")))))


def _groups(rest: str, devices: int) -> list[list[int]]:
    """Returns the groups of devices that communicate; one group of all if the operation lists none."""
    if match := _ALONG_AXES.search(rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        numbers = _numbers(devices, match[2] or str(devices), match[3]).reshape(tuple(sizes.values()))
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", match[4])]
        ways = math.prod(numbers.shape[axis] for axis in along)
        return np.moveaxis(numbers, along, range(-len(along), 0)).reshape(-1, ways).tolist()
    if match := _COMPUTED.search(rest):
        return _numbers(devices, match[2], match[3]).reshape(_integers(match[1])).tolist()
    if match := _LISTED.search(rest):
        return [[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d,]*)\}", match[1])]
    return [list(range(devices))]


def _numbers(devices: int, shape: str, order: str | None) -> np.ndarray:
    """Returns the numbers of all devices as an array of this shape, with its axes in another order."""
    numbers = np.arange(devices).reshape(_integers(shape))
    return numbers.transpose(_integers(order)) if order else numbers


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
