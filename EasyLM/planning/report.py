"""Plans as text."""

from collections.abc import Mapping

from EasyLM.planning.plan import Plan

_GB = 1e9


def text(plan: Plan) -> str:
    """Returns a plan as a table of lines, or one line if it failed before the compilation."""
    slices = f", {plan.num_slices} slices" if plan.num_slices > 1 else ""
    title = f"{plan.preset or 'the model'} on {plan.topology}{slices}"
    if plan.state_bytes_per_device is None:
        return f"error: {title}: {plan.error}"
    rows = {"": title, "devices": _devices(plan), "batch": f"{plan.batch_size} rows x {plan.seq_length} tokens"}
    rows |= {"remat": plan.remat} if plan.remat else {}
    rows |= _compiled(plan) if plan.peak_bytes_per_device is not None else {}
    rows |= _checkpoint(plan)
    if plan.error:
        rows["error"] = plan.error
    return "\n".join(f"{name:<14}{value}" if name else value for name, value in rows.items())


def _devices(plan: Plan) -> str:
    axes = " ".join(f"{axis}={size}" for axis, size in (plan.mesh or {}).items())
    processes = "1 process" if plan.processes == 1 else f"{plan.processes} processes"
    return f"{plan.devices} x {plan.device_kind} in {processes}, mesh {axes}"


def _compiled(plan: Plan) -> dict[str, str]:
    """Returns the lines of a step that compiled."""
    assumed = plan.assumptions or {}
    ratio = plan.matmul_flops_ratio
    offloaded = plan.offloaded_bytes_per_device
    kernels = ", ".join(f"{name} x {count}" for name, count in (plan.attention_kernels or {}).items())
    return {
        "memory": f"{_gb(plan.peak_bytes_per_device)} of {_gb(plan.hbm_bytes_per_device)} a device, of which the state "
        f"is {_gb(plan.state_bytes_per_device)}" + (f"; {_gb(offloaded)} of the host's" if offloaded else ""),
        "matmul FLOPs": "unknown: a loop has unknown trips"
        if ratio is None
        else f"{ratio:.2f} times those of the model",
        "attention": f"kernels: {kernels or 'none'}; all T x S weights in memory: {plan.attention_weights or 'no'}",
        "collectives": f"{_bytes_by_name(plan.collective_bytes)} a device and step",
        "network": f"{_bytes_by_name(plan.network_bytes)} of them between slices or nodes",
        "step": f"{plan.step_seconds_estimate:.3g} s, {plan.tokens_per_second_estimate:,.0f} tokens/s (an estimate for "
        f"{assumed['matmul_efficiency']:.0%} of {assumed['peak_tflops']:g} TFLOP/s a device, "
        f"{assumed['link_gb_per_second']:g} GB/s links, {assumed['network_gb_per_second']:g} GB/s network, and "
        "communication that overlaps with computation)",
        "compiled in": f"{plan.compile_seconds:.1f} s, after {plan.trace_seconds:.1f} s of tracing",
    }


def _checkpoint(plan: Plan) -> dict[str, str]:
    assumed = plan.assumptions or {}
    return {
        "checkpoint": f"{_gb(plan.checkpoint_bytes)}; each process needs {_gb(plan.host_bytes_per_process)} of host "
        f"memory; saved in {_seconds(plan.save_seconds_estimate)} (an estimate for "
        f"{assumed['host_gb_per_second']:g} GB/s to a process and {assumed['disk_gb_per_second']:g} GB/s to disk)",
    }


def _bytes_by_name(values: Mapping[str, int] | None) -> str:
    sent = {name: value for name, value in (values or {}).items() if value}
    return ", ".join(f"{name} {_gb(value)}" for name, value in sent.items()) or "none"


def _seconds(value: float | None) -> str:
    assert value is not None
    return f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s"


def _gb(value: int | None) -> str:
    """Returns bytes as text: three digits, in GB or MB."""
    assert value is not None
    return f"{value / _GB:.3g} GB" if value >= _GB / 10 else f"{value / 1e6:.3g} MB"
