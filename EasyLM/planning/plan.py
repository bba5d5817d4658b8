"""Compiles the train step of a task for a topology, and describes what it needs."""

import collections
import dataclasses
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from EasyLM.checkpoints import SavedPart
from EasyLM.planning.collectives import communication
from EasyLM.planning.estimates import Assumptions
from EasyLM.planning.hlo import Instruction, executed_instructions
from EasyLM.planning.matmuls import attention_weights, matmul_flops
from EasyLM.planning.topologies import Topology, compiling_for
from EasyLM.training import Model, Optimizer, abstract_batch, abstract_state, bytes_per_device, trace_step

# Parts of the names of attention kernels in HLO: cuDNN, and Pallas' kernels on TPUs.
_ATTENTION_KERNEL = re.compile("fmha|splash")
_TRACEBACK = re.compile(r'Traceback \(most recent call last\):\n(\s*File ".*\n(\s{4}.*\n)?)*')


@dataclasses.dataclass(frozen=True)
class PlannedTask:
    """A train step, and how its state is saved.

    Attributes:
      batch: arrays with the names, row shapes and types of a batch, of any number of rows.
      seq_length: tokens of a row.
      flops_per_row: model FLOPs of a row.
    """

    model: Model
    optimizer: Optimizer
    seed: int
    batch: Mapping[str, Any]
    batch_size: int
    seq_length: int
    flops_per_row: float
    saved: SavedPart


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a train step needs. Values are None where the step did not compile. Bytes and FLOPs are those of one step.
    With accumulation, they are means over the micro-steps of an update.

    Attributes:
      mesh: mesh axes and their sizes.
      trace_seconds, compile_seconds: tracing and lowering; XLA's compilation.
      peak_bytes_per_device: XLA's plan of the memory, the arguments included.
      hbm_bytes_per_device: memory of a device.
      state_bytes_per_device: bytes of the train state.
      offloaded_bytes_per_device: host memory for values of the forward pass that wait there for the backward pass.
      remat: what the backward pass does not recompute, and why.
      matmul_flops_ratio: FLOPs of matrix products over the model's FLOPs. None if a loop has unknown trips.
      attention_kernels: executions of each attention kernel on a device.
      attention_weights: type of an array of all T x S attention weights; empty if there is none.
      collective_bytes: bytes that a device communicates, by operation (see `collectives.Communication`).
      network_bytes: the part of them between slices or nodes.
      host_bytes_per_process: host memory of a process for the copy of its share of a checkpoint.
      checkpoint_bytes: bytes of the arrays of a checkpoint.
      save_seconds_estimate: until a checkpoint is on disk.
      assumptions: values that the estimates assume.
      error: why the step does not fit or compile, and what to change.
    """

    topology: str
    num_slices: int
    preset: str
    batch_size: int
    seq_length: int
    devices: int | None = None
    device_kind: str | None = None
    processes: int | None = None
    mesh: Mapping[str, int] | None = None
    trace_seconds: float | None = None
    compile_seconds: float | None = None
    peak_bytes_per_device: int | None = None
    hbm_bytes_per_device: int | None = None
    fits: bool | None = None
    state_bytes_per_device: int | None = None
    offloaded_bytes_per_device: int | None = None
    remat: str | None = None
    matmul_flops_ratio: float | None = None
    attention_kernels: Mapping[str, int] | None = None
    attention_weights: str | None = None
    collective_bytes: Mapping[str, int] | None = None
    network_bytes: Mapping[str, int] | None = None
    step_seconds_estimate: float | None = None
    tokens_per_second_estimate: float | None = None
    host_bytes_per_process: int | None = None
    checkpoint_bytes: int | None = None
    save_seconds_estimate: float | None = None
    assumptions: Mapping[str, float] | None = None
    error: str | None = None

    def with_values(self, **values: Any) -> "Plan":
        """Returns the plan with some values replaced."""
        return dataclasses.replace(self, **values)


def make_plan(plan: Plan, task: PlannedTask, mesh: Mesh, topology: Topology, assumptions: Assumptions) -> Plan:
    """Compiles the step and fills in the plan. If it does not fit or compile, the plan's `error` is the cause."""
    state = abstract_state(task.model, task.optimizer, mesh)
    file_bytes, copied_bytes = task.saved.sizes(task.model.saved_part(state))
    host_bytes = -(-copied_bytes // topology.num_processes)
    state_bytes = bytes_per_device(state)
    plan = plan.with_values(
        devices=mesh.devices.size,
        device_kind=topology.device_kind,
        processes=topology.num_processes,
        mesh=dict(mesh.shape),
        hbm_bytes_per_device=round(assumptions.hbm_gb * 1e9),
        state_bytes_per_device=state_bytes,
        host_bytes_per_process=host_bytes,
        checkpoint_bytes=file_bytes,
        save_seconds_estimate=assumptions.save_seconds(file_bytes, host_bytes),
        assumptions=dataclasses.asdict(assumptions),
    )
    begin = time.perf_counter()
    batch = abstract_batch(task.batch, task.batch_size, mesh)
    with compiling_for(topology.platform):
        traced = trace_step(task.model, task.optimizer, task.seed, mesh, state, batch)
        lowered = traced.lower(lowering_platforms=(topology.platform,))
        traced_at = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return plan.with_values(error=_cause(error), fits=False if _is_too_large(error) else None)
    compiled_at = time.perf_counter()
    # The only branch is the reduction of an update's gradients, see `EasyLM.training.accumulation`.
    executed = executed_instructions(compiled.as_text(), branch_share=1 / task.optimizer.micro_steps)
    sent = communication(executed, [topology.island_of(device) for device in mesh.devices.flat])
    flops, model_flops = matmul_flops(traced.jaxpr), task.batch_size * task.flops_per_row
    step_seconds = assumptions.step_seconds((flops or model_flops) / mesh.devices.size, state_bytes, sent)
    memory = compiled.memory_analysis()
    peak = peak_bytes(memory, topology.platform)
    fits = peak <= assumptions.hbm_gb * 1e9
    return plan.with_values(
        trace_seconds=traced_at - begin,
        compile_seconds=compiled_at - traced_at,
        peak_bytes_per_device=peak,
        fits=fits,
        offloaded_bytes_per_device=memory.host_temp_size_in_bytes,
        matmul_flops_ratio=flops and flops / model_flops,
        attention_kernels=_attention_kernels(executed),
        attention_weights=attention_weights(traced.jaxpr, task.seq_length),
        collective_bytes=sent.total,
        network_bytes=sent.across,
        step_seconds_estimate=step_seconds,
        tokens_per_second_estimate=task.batch_size * task.seq_length / step_seconds,
        error=None if fits else f"does not fit: {peak / 1e9:.1f} GB of {assumptions.hbm_gb:.1f} GB a device",
    )


def peak_bytes(memory: Any, platform: str) -> int:
    """Returns XLA's peak of the memory of a device, at most the sum of arguments, results and temporary arrays.

    XLA's peak is lower than that sum, because it knows which arrays are never there at once. But for CPUs it leaves out
    temporary arrays, and if values are offloaded, it can count those in the memory of the host.
    """
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes  # the others are donated arguments
    total = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    return total if platform == "cpu" else min(memory.peak_memory_in_bytes, total)


def _attention_kernels(executed: Iterable[tuple[float, Instruction]]) -> dict[str, int]:
    """Returns the executions of attention kernels by name: cuDNN's are targets of calls, Pallas' are names of calls."""
    counts: collections.Counter[str] = collections.Counter()
    for times, instruction in executed:
        if instruction.operation == "custom-call":
            target = re.search(r'custom_call_target="([^"]+)"', instruction.rest)
            names = [target[1] if target else "", re.sub(r"\.\d+$", "", instruction.name)]
            counts.update({name: round(times) for name in names if _ATTENTION_KERNEL.search(name)})
    return dict(counts)


def _is_too_large(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)


def _cause(error: Exception) -> str:
    """Returns the cause of a failed compilation in one line, without the lines of code that led to it."""
    text = _TRACEBACK.sub("", str(error)).partition("Suspected Python Code Location")[0]
    text = " ".join(text.split()).removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
    if used := re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", text):
        text = f"XLA needs {used[1]} of {used[2]} a device"
    return f"does not {'fit' if _is_too_large(error) else 'compile'}: {text[:300]}"
