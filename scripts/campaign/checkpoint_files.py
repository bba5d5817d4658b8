"""Kinds: run directories, train states, weights of Hugging Face models and of tokenizers.

References: the arrays that were saved, and for files without checksums what flax and safetensors read.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import types
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import msgpack
import numpy as np
import safetensors.numpy

from campaign.attempts import Attempt, RefusedError, require, require_equal
from campaign.mutations import mutated, mutated_json
from EasyLM import checkpoints
from EasyLM.checkpoints import listing, streaming
from EasyLM.checkpoints.safetensors_file import tensor_entry, write_safetensors
from EasyLM.errors import prefix_errors
from EasyLM.models.llama import convert_easylm_to_hf, hf_files, hf_layout
from EasyLM.models.llama.llama_config import LLaMAConfig
from EasyLM.storage import parse_json
from EasyLM.training import TrainState, batches
from tokenizer import formats

MODEL = LLaMAConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_sequence_length=64,
)
_STATE = "streaming_train_state"
_SOURCE = types.SimpleNamespace(fingerprint={"seq_length": 16})  # of the rows of a run
_ROOT = pathlib.Path(__file__).parents[2]


def run_directories(folder: pathlib.Path) -> Attempt:
    """Run directories of which one file is mutated or missing. A run resumes from a whole checkpoint, or refuses."""
    run, states = folder / "run", {}
    saver = checkpoints.Checkpointer(str(run), save_optimizer_state=True)
    for step in (2, 3, 4):
        state = random_state(step)
        metadata = checkpoints.make_metadata(step, {}, llama_config=dataclasses.asdict(MODEL))
        saver.save(state, step, batches.dataset_state(_SOURCE, 8 * step), metadata, milestone=step == 2)
        saver.wait()
        states[step] = _flat(checkpoints.load(f"trainstate::{run}/{_STATE}"))
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and not path.is_symlink()]

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        copy = case / "run"
        shutil.copytree(run, copy, symlinks=bool(rng.random() < 0.7))
        # The copies of a directory without links are files, of which the newest has to be damaged.
        path = copy / files[int(rng.integers(len(files)))].relative_to(run)
        if rng.random() < 0.1:
            path.unlink()
        else:
            _mutate_file(rng, path)
        newest, problems = listing.newest_whole(str(copy), checkpoints.CHECKPOINT_FORMATS)
        if newest is None:
            require(problems, "the run would start at step 0")
            raise RefusedError("; ".join(problems))
        arrays = _flat(checkpoints.load_entries(newest.saved.spec, newest.entries))
        step = int(arrays["step",])
        require(step in states, f"step {step} in the state")
        _require_arrays(arrays, states[step])
        with prefix_errors(newest.saved.dataset_state):  # as the trainer does
            row = batches.rows_consumed(newest.dataset_state, _SOURCE)
        require_equal(row, 8 * step, f"rows consumed, beside step {step}")
        require_equal(newest.saved.contents["step"], step, f"step of the metadata, beside step {step}")

    return attempt


def states(folder: pathlib.Path) -> Attempt:
    """Train states and files of parameters without checksums, as the LVM release writes them."""
    saver = checkpoints.Checkpointer(str(folder / "run"), save_optimizer_state=True)
    saver.save(random_state(1), 1, {}, checkpoints.make_metadata(1, {}))
    saver.wait()
    path = folder / "run" / _STATE
    with open(folder / "flax_params", "wb") as file:
        streaming.write_flax(file, [entry for entry in streaming.read_streaming(path) if entry.key[0] == "params"])
    whole = {"trainstate": path.read_bytes(), "flax_params": (folder / "flax_params").read_bytes()}

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        form = str(rng.choice([*whole]))
        path = case / "state"
        path.write_bytes(mutated(rng, whole[form]))
        got = {entry.key: entry.read() for entry in checkpoints.open_checkpoint(f"{form}::{path}")}
        if form == "trainstate":
            unpacker = msgpack.Unpacker(max_buffer_size=0)
            unpacker.feed(path.read_bytes())
            expected = {tuple(key): flax.serialization.from_bytes(None, value) for key, value in unpacker}
        else:
            content = flax.serialization.msgpack_restore(path.read_bytes())
            expected = {("params", *key): array for key, array in _flat(content).items()}
        _require_arrays(got, expected)

    return attempt


def exports(folder: pathlib.Path) -> Attempt:
    """Models that this project exported, of which one file is mutated."""
    saver = checkpoints.Checkpointer(str(folder / "run"), float_dtype="fp32")
    saver.save(random_state(1), 1, {}, checkpoints.make_metadata(1, {}, llama_config=dataclasses.asdict(MODEL)))
    saver.wait()
    sources = checkpoints.open_checkpoint(f"params::{folder}/run/streaming_params")
    tensors = hf_layout.hf_tensors(MODEL, sources, "run", None)
    for name, megabytes in {"one": 1.0, "several": 0.002}.items():
        convert_easylm_to_hf.export(MODEL, tensors, str(folder / name), megabytes)
    expected = _load_model(folder / "one")

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        model = case / "model"
        shutil.copytree(folder / str(rng.choice(["one", "several"])), model)
        path = sorted(model.iterdir())[int(rng.integers(len(os.listdir(model))))]
        _mutate_file(rng, path)
        _require_arrays(_load_model(model), expected)

    return attempt


def foreign_weights(folder: pathlib.Path) -> Attempt:
    """Safetensors files of other programs, which have no digests."""
    rng = np.random.default_rng(0)
    arrays = {f"layer.{i}.weight": rng.normal(size=(3, 5 + i)).astype(np.float32) for i in range(4)}
    arrays |= {"half": rng.normal(size=7).astype(np.float16), "scalar": np.full((), 3, np.float32)}
    whole = safetensors.numpy.save(arrays, {"format": "pt"})

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        (case / "model.safetensors").write_bytes(mutated(rng, whole))
        got = {entry.key: entry.read() for entry in hf_files.read_weights(str(case))}
        expected = safetensors.numpy.load_file(case / "model.safetensors")
        _require_arrays(got, {(name,): array for name, array in expected.items()})

    return attempt


def tokenizers(folder: pathlib.Path) -> Attempt:
    """Folders of tokenizers, of which one file is mutated. Safetensors files and torch files both have checksums."""
    own, torch = folder / "own", folder / "torch"
    shutil.copytree(_ROOT / "tests" / "golden" / "vqgan_small", torch)
    (torch / "golden.npz").unlink()
    own.mkdir()
    shutil.copy(torch / "config.json", own)
    expected = formats.read(torch)
    with open(own / "model.safetensors", "wb") as file:
        write_safetensors(file, [tensor_entry(name, array) for name, array in expected.tensors.items()])

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        copy = case / "tokenizer"
        shutil.copytree(own if rng.random() < 0.5 else torch, copy)
        files = sorted(copy.iterdir())
        _mutate_file(rng, files[int(rng.integers(len(files)))])
        got = formats.read(copy)
        _require_arrays(got.tensors, expected.tensors)
        written = json.loads((copy / "config.json").read_bytes())
        for key, value in got.settings.items():
            if key in written:
                require_equal(json.dumps(value), json.dumps(written[key]), key)

    return attempt


def random_state(step: int) -> TrainState:
    """Returns a state with random parameters of MODEL. The layers are stacked, as in memory."""
    rng = np.random.default_rng(step)
    params = jax.tree.map(
        lambda shape: rng.normal(size=shape.shape).astype(np.float32), hf_layout.parameter_shapes(MODEL)
    )
    return TrainState(np.asarray(step, np.int32), params, {"mu": jax.tree.map(lambda array: array / 2, params)})


def _flat(tree: Mapping[str, Any], key: tuple[str, ...] = ()) -> dict[tuple[str, ...], np.ndarray]:
    """Returns the arrays of nested dicts by key."""
    arrays = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            arrays |= _flat(value, (*key, name))
        else:
            arrays[*key, name] = np.asarray(value)
    return arrays


def _load_model(directory: pathlib.Path) -> dict[tuple[str, ...], np.ndarray]:
    return {entry.key: entry.read() for entry in hf_layout.read_model(str(directory))[1]}


def _mutate_file(rng: np.random.Generator, path: pathlib.Path) -> None:
    """Mutates a file, in half of the cases as JSON if it is JSON."""
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.5:
        path.write_bytes(mutated_json(rng, parse_json(data)))
    else:
        path.write_bytes(mutated(rng, data))


def _require_arrays(got: Mapping, expected: Mapping) -> None:
    require_equal(sorted(got), sorted(expected), "names of arrays")
    for key, array in expected.items():
        require_equal(got[key], np.asarray(array), key if isinstance(key, str) else "/".join(key))
