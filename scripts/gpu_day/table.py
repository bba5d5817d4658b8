"""Compares records with the limits of the device, and formats them as text."""

from collections.abc import Callable
from typing import Any

from EasyLM.models.llama import costs, llama_config
from EasyLM.training.throughput import PEAK_TFLOPS

Records = list[dict[str, Any]]
# Tokens per second of one H200 at 32,768 tokens per step of 4,096-token rows, if matmuls run at 790 TFLOP/s, attention
# at published rates of kernels, and the optimizer's memory traffic at 4.3 TB/s.
H200_ROOFLINE = {
    "vqlm_100m": 388e3,
    "vqlm_300m": 231e3,
    "vqlm_600m": 118e3,
    "vqlm_1b": 76.8e3,
    "vqlm_3b": 29.5e3,
    "vqlm_7b": 15.9e3,
}
H200_BYTES_PER_SECOND, H200_TOKENS, LENGTH = 4.3e12, 32768, 4096
# The optimizer reads a float32 state (12) and a bf16 gradient (2), and writes the state and a bf16 copy (2).
OPTIMIZER_BYTES = 28
_KERNELS = 9  # lines of a table of kernels; the file of records has more


def with_shares(records: Records) -> Records:
    """Returns the records with shares of the device's limits, where both are known."""
    machine = {record["name"]: record for record in records if record["section"] == "machine"}
    rates = {
        "copy": machine.get("copy", {}).get("bytes_per_second"),
        "matmul": machine.get("matmul, bfloat16", {}).get("flops_per_second"),
        "fp32": machine.get("matmul, float32", {}).get("flops_per_second"),
    }
    kind = machine.get("device", {}).get("kind", "")
    rates["peak"] = next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in kind), None)
    add = {"train": _train_shares, "decode": _decode_shares, "vqgan": _vqgan_shares}
    return [
        record | add[record["section"]](record, rates, records)
        if record["section"] in add and "error" not in record
        else record
        for record in records
    ]


def _train_shares(record, rates, records):
    shares = {}
    if rates["matmul"]:
        shares["share_of_matmul"] = record["flops_per_second"] / rates["matmul"]
    if rates["peak"]:
        shares["mfu"] = record["flops_per_second"] / rates["peak"]
    if rates["peak"] and rates["copy"] and record["preset"] in H200_ROOFLINE:
        shares["roofline_tokens_per_second"] = roofline(record, rates["copy"])
        shares["share_of_roofline"] = record["tokens_per_second"] / shares["roofline_tokens_per_second"]
    return shares


def roofline(record: dict[str, Any], bytes_per_second: float) -> float:
    """Returns tokens per second: the H200's roofline with this device's memory and the record's tokens per step.

    A model with fewer layers than its preset has the preset's seconds per FLOP.
    """
    preset = llama_config.PRESETS[record["preset"]]
    h200_optimizer = OPTIMIZER_BYTES * costs.num_parameters(preset) / H200_BYTES_PER_SECOND / H200_TOKENS
    compute = 1 / H200_ROOFLINE[record["preset"]] - h200_optimizer
    flops = record["flops_per_second"] / record["tokens_per_second"]
    compute *= flops / costs.flops_per_token(preset, LENGTH)
    return 1 / (compute + OPTIMIZER_BYTES * record["parameters"] / bytes_per_second / record["tokens_per_step"])


def _decode_shares(record, rates, records):
    shares = {}
    if rates["copy"] and "step_bytes" in record:
        shares["share_of_memory_limit"] = record["step_bytes"] / rates["copy"] / record["step_seconds"]
    if rates["peak"] and "prompt_flops" in record:
        shares["prompt_mfu"] = record["prompt_flops"] / record["prompt_seconds"] / rates["peak"]
    for other in records if record["variant"] else []:
        same = all(other.get(name) == record[name] for name in ("preset", "rows", "prompt"))
        if other["section"] == "decode" and same and other["variant"] == "" and "error" not in other:
            shares["step_ratio_to_ours"] = record["step_seconds"] / other["step_seconds"]
            shares["prompt_ratio_to_ours"] = record["prompt_seconds"] / other["prompt_seconds"]
    return shares


def _vqgan_shares(record, rates, records):
    rate = rates["fp32" if record["dtype"] == "fp32" else "matmul"]
    return {"share_of_matmul": record["flops_per_second"] / rate} if rate else {}


def text(records: Records) -> str:
    """Returns a table of all records: a line each, with the values that a reader compares."""
    lines = []
    for record in with_shares(records):
        values = [form(record[name]) for name, form in _COLUMNS.items() if record.get(name) is not None]
        if "error" in record:
            values.append(record["error"])
        if "ok" in record:
            values.append("ok" if record["ok"] else "FAILED")
        lines.append(f"{record['section']:12}{record['name']}: {'; '.join(values)}")
        for kernel, milliseconds in list(record.get("milliseconds", {}).items())[:_KERNELS]:
            lines.append(f"{'':12}{milliseconds:9.3f} ms  {kernel[:80]}")
    return "\n".join(lines)


def _scaled(scale: float, unit: str) -> Callable[[float], str]:
    return lambda value: f"{value / scale:.4g} {unit}"


def _share(of: str) -> Callable[[float], str]:
    return lambda value: f"{value:.1%} of {of}"


_COLUMNS: dict[str, Callable[[Any], str]] = {
    "kind": str,
    "jax": lambda version: f"JAX {version}",
    "bytes_limit": _scaled(1e9, "GB"),
    "bytes_per_second": _scaled(1e12, "TB/s"),
    "tokens_per_second": _scaled(1, "tokens/s"),
    "images_per_second": _scaled(1, "images/s"),
    "step_seconds": _scaled(1e-3, "ms per step"),
    "flops_per_second": _scaled(1e12, "TFLOP/s"),
    "forward_flops_per_second": _scaled(1e12, "TFLOP/s forward"),
    "both_flops_per_second": _scaled(1e12, "TFLOP/s forward and backward"),
    "mfu": lambda value: f"MFU {value:.1%}",
    "share_of_matmul": _share("the matmul rate"),
    "share_of_roofline": _share("the roofline"),
    "share_of_memory_limit": _share("the memory limit"),
    "prompt_seconds": _scaled(1e-3, "ms for the prompt"),
    "prompt_mfu": lambda value: f"MFU {value:.1%} of it",
    "step_ratio_to_ours": lambda value: f"step {value:.2f} x ours",
    "prompt_ratio_to_ours": lambda value: f"prompt {value:.2f} x ours",
    "planned_bytes": _scaled(1e9, "GB planned"),
    "peak_bytes": _scaled(1e9, "GB peak"),
    "compile_seconds": _scaled(1, "s to compile"),
    "errors": lambda errors: f"largest error {max(errors.values()):.1e}",
    "gradient_error": lambda value: f"gradient error {value:.1e}",
    "loss_error": lambda value: f"loss error {value:.1e}",
    "decode_error": lambda value: f"error {value:.1e}",
    "equal_share": _share("codes equal"),
}
