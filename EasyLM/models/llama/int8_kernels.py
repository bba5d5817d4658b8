"""int8 kernels for inference: symmetric, with one scale for each output.

A kernel W [I, O] becomes round(W / scale) in int8, with scale[o] = max over i of |W[i, o]| / 127, float32. The layer
multiplies by the integers, which bf16 represents exactly, and then by the scales. Embedding, norms and head keep their
type: together they are 1% of a 7B model.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from EasyLM.checkpoints import Entry

_LIMIT = 127  # symmetric: -128 is not used
_ROWS = 512  # rows of a kernel that are converted at a time, so that their float32 copy is small


def quantize(kernel_IO: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a kernel in int8, [I, O], and its scales, float32 [O]."""
    chunks = [kernel_IO[begin : begin + _ROWS] for begin in range(0, len(kernel_IO), _ROWS)]
    largest_O = np.max([np.abs(chunk.astype(np.float32)).max(0) for chunk in chunks], axis=0)
    scale_O = np.where(largest_O > 0, largest_O / _LIMIT, 1).astype(np.float32)
    integers = [np.rint(chunk.astype(np.float32) / scale_O).astype(np.int8) for chunk in chunks]
    return np.concatenate(integers), scale_O


def quantized_shapes(tree: Mapping[str, Any]) -> dict:
    """Returns the shapes of parameters with separate layers after `quantized_entries`."""
    shapes = {}
    for name, branch in tree.items():
        if _is_linear(branch) and name != "lm_head":
            kernel = branch["kernel"]
            shapes[name] = {
                "kernel": jax.ShapeDtypeStruct(kernel.shape, jnp.int8),
                "scale": jax.ShapeDtypeStruct(kernel.shape[1:], jnp.float32),
            }
        else:
            shapes[name] = quantized_shapes(branch) if isinstance(branch, Mapping) else branch
    return shapes


def is_quantized(layer: Mapping[str, Any]) -> bool:
    """Whether a layer's kernels are int8."""
    return "scale" in layer["attention"]["wq"]


def quantized_entries(entries: Sequence[Entry]) -> list[Entry]:
    """Returns the entries of parameters with int8 kernels and their scales. They are read and converted one by one."""
    quantized: list[Entry] = []
    for entry in entries:
        if entry.key[-1] == "kernel" and len(entry.shape) == 2 and "h" in entry.key:
            quantized += _quantized(entry)
        else:
            quantized.append(entry)
    return quantized


def _is_linear(branch: Any) -> bool:
    return isinstance(branch, Mapping) and "kernel" in branch and len(branch["kernel"].shape) == 2


def _quantized(entry: Entry) -> tuple[Entry, Entry]:
    """Returns the entries of the int8 kernel and of its scales. The kernel is read once for both."""
    lock, scales = threading.Lock(), []

    def read_kernel(out: np.ndarray) -> None:
        with lock:
            integers, scale_O = quantize(entry.read())
            scales.append(scale_O)
        np.copyto(out, integers)

    def read_scale(out: np.ndarray) -> None:
        with lock:
            scale_O = scales.pop() if scales else quantize(entry.read())[1]
        np.copyto(out, scale_O)

    return (
        Entry(entry.key, entry.shape, np.dtype(np.int8), read_kernel),
        Entry((*entry.key[:-1], "scale"), entry.shape[1:], np.dtype(np.float32), read_scale),
    )
