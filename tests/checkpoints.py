"""States and files for the tests of checkpoints."""

import jax
import ml_collections
import numpy as np

from EasyLM import checkpoint, streaming
from EasyLM.train import TrainState

METADATA = {"flags": {}}


def settings(float_dtype="", save_optimizer_state=True):
    return ml_collections.ConfigDict({"float_dtype": float_dtype, "save_optimizer_state": save_optimizer_state})


def golden_state(golden, run="final") -> TrainState:
    tree = checkpoint.load(f"trainstate::{golden}/lvm_tiny/{run}/streaming_train_state")
    return TrainState(tree["step"], tree["params"], tree["opt_state"])


def small_state(step: int) -> TrainState:
    """Its numbers say which step it is of."""
    layer = {"w": np.full((2, 3, 4), step, np.float32)}
    params = {"params": {"transformer": {"h": layer, "ln_f": np.full(5, step, np.float32)}}}
    return TrainState(np.int32(step) * np.ones((), np.int32), params, {"mu": jax.tree.map(np.copy, params)})


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def file_content(path) -> dict:
    return {entry.key: entry.read() for entry in streaming.read_streaming(path)}


def contents(run_dir) -> tuple[int, int, int]:
    """The step that each of the newest files says it is of; the state is checked to be whole."""
    saved = checkpoint.newest(run_dir)
    state = checkpoint.load(saved.spec, small_state(0))
    steps = {int(value) for array in jax.tree.leaves(state) for value in np.ravel(array)}
    assert len(steps) == 1
    files = saved.dataset_state, saved.metadata
    return steps.pop(), *(checkpoint.load_metadata(path)["step"] for path in files)


def save(saver, step, milestone=False):
    saver.save(small_state(step), step, {"step": step}, {"step": step, **METADATA}, milestone=milestone)
    saver.wait()
