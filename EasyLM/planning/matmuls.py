"""FLOPs of matrix products in a traced program, and its attention weights.

XLA's cost analysis counts the body of a loop once, which leaves out all layers but one. Here the FLOPs of a loop are
multiplied by its trips. The trips of a loop may depend on the index of an outer loop, as in blockwise attention.
Therefore integers that do not depend on the program's arguments are computed.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

_LARGEST_KNOWN = 1 << 16  # elements of an integer array whose values are computed
_CAUSAL = 0.5  # share of the scores that causal kernels compute
# Products of T x S x K in a kernel, each 2 FLOPs: forward are scores and output. Backward are scores again, and the
# gradients of values, weights, queries and keys. Splash has two kernels backward, which both compute the scores and the
# gradients of the weights.
_KERNEL_PRODUCTS = {
    "dot_product_attention_fwd": 2,
    "dot_product_attention_bwd": 5,
    "splash_mha_fwd": 2,
    "splash_mha_dkv": 4,
    "splash_mha_dq": 3,
}

_Known = Sequence[np.ndarray | None]  # the values of variables; None: they depend on the program's arguments


def matmul_flops(closed: core.ClosedJaxpr) -> float | None:
    """Returns the FLOPs of the matrix products of a program over all devices.

    Products whose results are not used do not count. Each multiplication and each addition is a FLOP.

    Returns:
      FLOPs; None if a loop with matrix products has an unknown number of trips.
    """
    flops, _ = _run(_without_dead_code(closed.jaxpr), closed.consts, [None] * len(closed.jaxpr.invars))
    return None if math.isnan(flops) else flops


def attention_weights(closed: core.ClosedJaxpr, length: int) -> str:
    """Returns the type of the largest array that holds all T x S attention weights of several heads.

    Args:
      length: T, the length of the sequence.

    Returns:
      For example "float32[8,32,4096,4096]", over all devices; empty if there is none.
    """
    scores = [eqn for eqn in _equations(_without_dead_code(closed.jaxpr)) if _is_scores(eqn, length)]
    weights = [_aval(eqn.outvars[0]) for eqn in scores]
    if not weights:
        return ""
    largest = max(weights, key=lambda aval: aval.size * aval.dtype.itemsize)
    return f"{largest.dtype.name}[{','.join(map(str, largest.shape))}]"


def _is_scores(eqn: core.JaxprEqn, length: int) -> bool:
    """Whether an equation multiplies all queries with all keys, for each row and head.

    The queries of a group may be merged with the tokens.
    """
    if eqn.primitive.name != "dot_general":
        return False
    contracted, batch = eqn.params["dimension_numbers"]
    free = [
        [size for axis, size in enumerate(_aval(atom).shape) if axis not in (*contracted[side], *batch[side])]
        for side, atom in enumerate(eqn.invars)
    ]
    return len(batch[0]) >= 2 and all(any(size % length == 0 for size in sizes) for sizes in free)


def _without_dead_code(jaxpr: core.Jaxpr) -> core.Jaxpr:
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]


def _equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Yields all equations, those of inner programs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from _equations(inner)


def _run(jaxpr: core.Jaxpr, consts: _Known, args: _Known) -> tuple[float, list[np.ndarray | None]]:
    """Returns the FLOPs of a program, and the values of its results as far as they are known."""
    values: dict[Any, np.ndarray | None] = {}

    def read(atom: Any) -> np.ndarray | None:
        if isinstance(atom, core.Literal):
            return _small_integers(np.asarray(atom.val, _aval(atom).dtype))
        return values.get(atom)

    def write(variables: Sequence[Any], known: _Known) -> None:
        values.update(zip(variables, map(_small_integers, known), strict=True))

    write(jaxpr.constvars, consts)
    write(jaxpr.invars, args)
    total = 0.0
    for eqn in jaxpr.eqns:
        flops, known = _equation(eqn, [read(atom) for atom in eqn.invars])
        total += flops
        write(eqn.outvars, known)
    return total, [read(atom) for atom in jaxpr.outvars]


def _equation(eqn: core.JaxprEqn, known: _Known) -> tuple[float, _Known]:
    name, unknown = eqn.primitive.name, [None] * len(eqn.outvars)
    if name == "dot_general":
        return _dot_flops(eqn), unknown
    kernel_name = eqn.params["name"] if name == "pallas_call" else name
    for kernel, products in _KERNEL_PRODUCTS.items():
        if kernel in kernel_name:
            return _kernel_flops(eqn, products), unknown
    if name == "scan":
        return _scan(eqn, known)
    if name == "while":
        return _while_flops(eqn, known), unknown
    if name == "cond":
        branches = [_run(branch.jaxpr, branch.consts, known[1:])[0] for branch in eqn.params["branches"]]
        return (branches[int(known[0])] if known[0] is not None else max(branches)), unknown
    inner = list(core.jaxprs_in_params(eqn.params))
    if inner:
        closed = next((value for value in eqn.params.values() if isinstance(value, core.ClosedJaxpr)), None)
        jaxpr, consts = (closed.jaxpr, closed.consts) if closed else (inner[0], [])
        same = len(jaxpr.invars) == len(known)
        flops, results = _run(jaxpr, consts, known if same else [None] * len(jaxpr.invars))
        return flops * _copies(eqn), results if len(results) == len(unknown) and same else unknown
    return 0.0, _evaluated(eqn, known)


def _dot_flops(eqn: core.JaxprEqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2.0 * _aval(eqn.outvars[0]).size * math.prod(_aval(eqn.invars[0]).shape[axis] for axis in contracted)


def _kernel_flops(eqn: core.JaxprEqn, products: int) -> float:
    """Returns the FLOPs of a causal attention kernel.

    Its first floating-point inputs are queries and keys: [B, T, H, K] of cuDNN, [..., H, T, K] of splash.
    """
    q, k = [_aval(atom) for atom in eqn.invars if jax.numpy.issubdtype(_aval(atom).dtype, jax.numpy.floating)][:2]
    keys_axis = -2 if eqn.primitive.name == "pallas_call" else 1
    return _CAUSAL * 2.0 * products * q.size * k.shape[keys_axis]


def _scan(eqn: core.JaxprEqn, known: _Known) -> tuple[float, _Known]:
    """Returns the FLOPs of a scan, and its results. If it reads known integers, each trip is evaluated by itself."""
    params, closed = eqn.params, eqn.params["jaxpr"]
    # Inputs are constants, carry and sequences; results are carry and sequences. A trip sees sequences without their
    # first axis. The names of the counts depend on JAX's version.
    num_xs = sum(_aval(outer).ndim > _aval(var).ndim for outer, var in zip(eqn.invars, closed.jaxpr.invars))
    num_carry = sum(_aval(outer).ndim == _aval(atom).ndim for outer, atom in zip(eqn.outvars, closed.jaxpr.outvars))
    first = len(known) - num_xs
    fixed = first - num_carry
    consts, carry, xs = known[:fixed], known[fixed:first], known[first:]
    if all(x is None for x in xs) or params["length"] == 0:
        flops, _ = _run(closed.jaxpr, closed.consts, [*consts, *[None] * (len(known) - fixed)])
        return params["length"] * flops, [None] * len(eqn.outvars)
    total, rows = 0.0, []
    indices = range(params["length"])
    for index in reversed(indices) if params["reverse"] else indices:
        inputs = [None if x is None else x[index] for x in xs]
        flops, results = _run(closed.jaxpr, closed.consts, [*consts, *carry, *inputs])
        carry, total = results[: len(carry)], total + flops
        rows.append(results[len(carry) :])
    rows = rows[::-1] if params["reverse"] else rows
    stacked = [None if any(value is None for value in column) else np.stack(column) for column in zip(*rows)]
    return total, [*carry, *stacked]


def _while_flops(eqn: core.JaxprEqn, known: _Known) -> float:
    params, body = eqn.params, eqn.params["body_jaxpr"]
    conditions, fixed = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    flops, _ = _run(body.jaxpr, body.consts, [*known[conditions:fixed], *[None] * (len(known) - fixed)])
    if flops == 0:
        return 0.0
    trips = _trips(params["cond_jaxpr"].jaxpr, body.jaxpr, [*known[:conditions], *known[fixed:]], conditions, fixed)
    return math.nan if trips is None else flops * trips


def _trips(condition: core.Jaxpr, body: core.Jaxpr, known: _Known, conditions: int, fixed: int) -> int | None:
    """Returns the trips of a `fori_loop`, which counts up by 1 while its counter is less than a limit.

    Args:
      known: the values of the condition's inputs before the first trip.
      conditions: number of the condition's inputs that no trip changes.
      fixed: conditions, plus the number of the body's inputs that no trip changes.
    """
    if len(condition.eqns) != 1 or condition.eqns[0].primitive.name != "lt":
        return None
    values = dict(zip(condition.invars, known, strict=True))
    counter, limit = condition.eqns[0].invars
    begin, end = (
        _small_integers(np.asarray(atom.val)) if isinstance(atom, core.Literal) else values.get(atom)
        for atom in (counter, limit)
    )
    at = condition.invars.index(counter) - conditions if counter in values else -1
    if begin is None or end is None or at < 0:
        return None
    added = next((eqn for eqn in body.eqns if body.outvars[at] in eqn.outvars), None)
    if added is None or added.primitive.name != "add":
        return None
    steps = [atom.val if isinstance(atom, core.Literal) else atom for atom in added.invars]
    return max(0, int(end) - int(begin)) if steps == [body.invars[fixed - conditions + at], 1] else None


def _aval(atom: Any) -> jax.core.ShapedArray:
    """Returns the shape and type of a variable or literal."""
    return atom.aval


def _copies(eqn: core.JaxprEqn) -> int:
    """Returns on how many devices an inner program of one device's shapes runs."""
    return eqn.params["mesh"].size if eqn.primitive.name == "shard_map" else 1


def _evaluated(eqn: core.JaxprEqn, known: _Known) -> _Known:
    """Returns the results of an equation whose inputs are known integers."""
    if any(value is None for value in known) or any(not _is_small_integer(var.aval) for var in eqn.outvars):
        return [None] * len(eqn.outvars)
    results = eqn.primitive.bind(*known, **eqn.params)
    return [np.asarray(value) for value in (results if eqn.primitive.multiple_results else [results])]


def _is_small_integer(aval: Any) -> bool:
    is_array = isinstance(aval, jax.core.ShapedArray) and not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)
    return is_array and aval.dtype.kind in "iub" and aval.size <= _LARGEST_KNOWN


def _small_integers(value: Any) -> np.ndarray | None:
    if value is None or jax.dtypes.issubdtype(getattr(value, "dtype", np.float64), jax.dtypes.extended):
        return None
    return np.asarray(value) if value.dtype.kind in "iub" and value.size <= _LARGEST_KNOWN else None
