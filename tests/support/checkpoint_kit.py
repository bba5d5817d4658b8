"""States and files for the tests of checkpoints."""

import dataclasses

import jax
import numpy as np

from EasyLM import checkpoints
from EasyLM.checkpoints import streaming
from EasyLM.models.llama import hf_layout
from EasyLM.training.step import TrainState

METADATA = {"flags": {}}


def make_checkpointer(run_dir, float_dtype="", save_optimizer_state=True, **options) -> checkpoints.Checkpointer:
    options |= {"float_dtype": float_dtype, "save_optimizer_state": save_optimizer_state}
    return checkpoints.Checkpointer(str(run_dir), **options)


def golden_state(golden, run="final") -> TrainState:
    tree = checkpoints.load(f"trainstate::{golden}/lvm_tiny/{run}/streaming_train_state")
    return TrainState(tree["step"], tree["params"], tree["opt_state"])


def small_state(step: int) -> TrainState:
    """A state whose numbers all equal its step."""
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
    """Returns the step in each file of the latest checkpoint. Asserts that all arrays of the state have one step."""
    saved = checkpoints.latest_checkpoint(run_dir)
    state = checkpoints.load(saved.spec, small_state(0))
    steps = {int(value) for array in jax.tree.leaves(state) for value in np.ravel(array)}
    assert len(steps) == 1
    files = saved.dataset_state, saved.metadata
    return steps.pop(), *(checkpoints.load_metadata(path)["step"] for path in files)


def save(saver, step, milestone=False):
    saver.save(small_state(step), step, {"step": step}, {"step": step, **METADATA}, milestone=milestone)
    saver.wait()


def random_params(directory, model):
    """Writes a streaming file of random parameters with its metadata, and returns the parameters.

    The parameters are large enough that logits are of order 1 and attention is far from uniform, so that an error in a
    layer changes the outputs.
    """
    rng = np.random.default_rng(0)

    def random_array(path, x):
        name, noise = jax.tree_util.keystr(path), rng.normal(0, 1, x.shape).astype(np.float32)
        if "norm" in name or "ln_f" in name:
            return np.float32(1) + np.float32(0.1) * noise
        if "embedding" in name:  # a tied one is the head too
            return noise * np.float32(x.shape[-1] ** -0.5 if model.tie_word_embeddings else 1)
        gain = 1.4 if "wq" in name or "wk" in name else 1  # attention's scores have a standard deviation of 2
        return noise * np.float32(gain * x.shape[-2] ** -0.5)

    params = jax.tree_util.tree_map_with_path(random_array, hf_layout.parameter_shapes(model))
    saver = make_checkpointer(directory, "fp32", save_optimizer_state=False)
    state = type("State", (), {"params": params})
    saver.save(state, 0, {}, checkpoints.make_metadata(0, {}, llama_config=dataclasses.asdict(model)))
    saver.wait()
    return params
