"""Each prefix given each kind of checkpoint: it loads, or the error names a prefix and a path that do."""

import logging
import os
import pathlib
import re
import shutil

import fsspec
import pytest
from checkpoint_kit import make_checkpointer, save, small_state
from convert_kit import export, run, tiny_state

from EasyLM import checkpoints
from EasyLM.checkpoints.identification import identify
from EasyLM.errors import UserError
from EasyLM.models.llama import convert_checkpoint
from EasyLM.models.llama.hf_layout import CHECKPOINT_FORMATS

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lvm_tiny"
STEP = "checkpoints/step_00000001"
STATE, PARAMS = ("trainstate", "trainstate_params"), ("params",)
# Path -> the prefixes that load it; what is loaded in place of it by another prefix; the prefixes of that.
TABLE = {
    "state": (STATE, "state", STATE),
    "params": (PARAMS, "params", PARAMS),
    "flax": (("flax_params",), "flax", ("flax_params",)),
    "run": ((), "run/streaming_train_state", STATE),
    "run/checkpoints": ((), f"run/{STEP}/streaming_train_state", STATE),
    f"run/{STEP}": ((), f"run/{STEP}/streaming_train_state", STATE),
    "params_run": ((), "params_run/streaming_params", PARAMS),
    "orbax_run": (("orbax",), "orbax_run/orbax_train_state", STATE),
    "orbax_run/orbax_train_state": ((*STATE, "orbax"), "orbax_run/orbax_train_state", STATE),
    "orbax_run/checkpoints": (("orbax",), f"orbax_run/{STEP}/orbax_train_state", STATE),
    f"orbax_run/{STEP}": (("orbax",), f"orbax_run/{STEP}/orbax_train_state", STATE),
    "orbax_params_run": (("orbax",), "orbax_params_run/orbax_params", ("orbax",)),
    "orbax_params_run/orbax_params": (("orbax",), "orbax_params_run/orbax_params", ("orbax",)),
    "converted": (("orbax",), "converted/orbax_train_state", STATE),
    "without_links": ((), f"without_links/{STEP}/streaming_train_state", STATE),  # as on an object store
    "manager": (("orbax",), "manager/10/default", STATE),
    "manager/9": (("orbax",), "manager/9/default", STATE),
    "hf": (("huggingface",), "hf", ("huggingface",)),
    "hf/model.safetensors": ((), "hf", ("huggingface",)),
    "hf/config.json": ((), "hf", ("huggingface",)),
    "tokenizer": ((), None, ()),
    "text": ((), None, ()),
    "cut": ((), None, ()),
    "empty": ((), None, ()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import orbax.checkpoint as ocp

    folder = tmp_path_factory.mktemp("kinds")
    for name, path in {"state": "final/streaming_train_state", "params": "streaming_params_bf16"}.items():
        shutil.copy(GOLDEN / path, folder / name)
    shutil.copy(GOLDEN / "flax_params.msgpack", folder / "flax")
    for name in ("run", "params_run", "orbax_run", "orbax_params_run"):
        format = "orbax" if "orbax" in name else "streaming"
        save(make_checkpointer(folder / name, save_optimizer_state="params" not in name, format=format), 1)
    run(convert_checkpoint, load_checkpoint=f"trainstate::{folder}/state", output=f"{folder}/converted")
    shutil.copytree(folder / "run" / "checkpoints", folder / "without_links" / "checkpoints")
    with ocp.CheckpointManager(folder / "manager") as manager:
        state = small_state(1)
        for step in (9, 10):
            tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
            manager.save(step, args=ocp.args.StandardSave(tree))
    export(tiny_state(GOLDEN.parent), folder / "hf")
    shutil.copytree(GOLDEN.parent / "vqgan_small", folder / "tokenizer")
    (folder / "text").write_text("not a checkpoint")
    (folder / "cut").write_bytes((folder / "state").read_bytes()[:100_000])
    (folder / "empty").mkdir()
    return folder


def open_(spec):
    return checkpoints.open_checkpoint(spec, CHECKPOINT_FORMATS)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("prefix", CHECKPOINT_FORMATS)
def test_a_prefix_loads_the_checkpoint_or_the_error_names_the_right_one(folder, name, prefix):
    loaded_by, path, prefixes = TABLE[name]
    spec = f"{prefix}::{folder}/{name}"
    if prefix in loaded_by:
        assert {entry.key[0] for entry in open_(spec)} >= {"params"}
        return
    with pytest.raises(UserError) as caught:
        open_(spec)
    message = str(caught.value)
    named = re.findall(rf"(\w+)::({re.escape(str(folder))}/[\w/]+\w)", message.partition("load it as ")[2])
    if prefix == "trainstate_ema" and prefixes == STATE:
        is_right = path == name
        expected = [] if is_right else [("trainstate_ema", f"{folder}/{path}")]
        assert "holds no average of the parameters" in message if is_right else "; it holds " in message
    else:
        chosen = (prefix,) if prefix in prefixes else prefixes
        expected = [(right, f"{folder}/{path}") for right in chosen]
    assert named == expected and "\n" not in message
    for right, right_path in named:
        if right != "trainstate_ema":
            open_(f"{right}::{right_path}")


def test_a_path_without_a_prefix_is_told_its_prefix(folder):
    with pytest.raises(
        UserError, match=f"must be PREFIX::PATH.*; it is a file of parameters: load it as params::{folder}"
    ):
        open_(f"{folder}/params")


def test_a_prefix_that_the_command_lacks_is_not_named(folder):
    with pytest.raises(UserError, match=r"as trainstate:: needs; it is a Hugging Face model$"):
        checkpoints.open_checkpoint(f"trainstate::{folder}/hf")


def test_a_damaged_checkpoint_is_passed_over(folder, tmp_path):
    """The newest step whose headers can be read is named."""
    shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    steps = tmp_path / "run" / "checkpoints"
    shutil.copytree(steps / "step_00000001", steps / "step_00000002")
    os.truncate(steps / "step_00000002" / "streaming_train_state", 50)
    found = identify(str(steps))
    assert found is not None and found.path == f"{steps}/step_00000001/streaming_train_state"


def test_remote_checkpoints_are_identified(folder, caplog):
    caplog.set_level(logging.WARNING)
    root = "memory://identified"
    fsspec.filesystem("memory").put(str(folder / "without_links"), "/identified/run", recursive=True)
    fsspec.filesystem("memory").put(str(folder / "flax"), "/identified/flax")
    state = f"{root}/run/checkpoints/step_00000001/streaming_train_state"
    for spec, right in (
        (f"trainstate::{root}/run", f"trainstate::{state}"),
        (f"params::{root}/flax", f"flax_params::{root}/flax"),
    ):
        with pytest.raises(UserError, match=f"load it as {right}$"):
            open_(spec)
    assert not caplog.records


def test_a_remote_hugging_face_model_must_be_copied(folder):
    fsspec.filesystem("memory").put(str(folder / "hf"), "/identified/hf", recursive=True)
    copy = "it is a Hugging Face model, which is read from a local disk: copy it to one"
    with pytest.raises(UserError, match=rf"memory://identified/hf is not a file, as params:: needs; {copy}$"):
        open_("params::memory://identified/hf")
