"""Each flagfile of configs/ parses with the trainer's flags, and its model, optimizer and mesh can be made."""

import json
import pathlib
import re
from functools import partial

import jax
import pytest

from EasyLM import flags
from EasyLM.models.llama import llama_config, llama_model, llama_train
from EasyLM.parallel import check_batch_size, make_mesh
from EasyLM.training import make_optimizer

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.flags"))
PARAMETERS = {"7b_finetune": 6.54e9, "7b_pretrain": 6.54e9, "debug": 2.45e6, "demo": 10.16e6, "demo_finetune": 10.16e6}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SLURM_NNODES", "4")


def parse(path: pathlib.Path, *arguments: str):
    return flags.parse(llama_train.FLAGS, ["llama_train", f"--flagfile={path}", *arguments])


def test_there_is_a_config_for_each_recipe():
    assert [path.stem for path in CONFIGS] == sorted(PARAMETERS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_model_optimizer_and_mesh_can_be_made(path):
    config = parse(path)
    model = llama_config.build_config(config.load_llama_config, config.llama, config.update_llama_config)
    params = jax.eval_shape(partial(llama_model.init_params, model), jax.random.key(0))
    jax.eval_shape(make_optimizer(config.optimizer).init, params)
    assert sum(x.size for x in jax.tree.leaves(params)) == pytest.approx(PARAMETERS[path.stem], rel=0.01)
    dataset = config.train_dataset.json_dataset
    check_batch_size("batch_size", dataset.batch_size, make_mesh(config.mesh_dim, jax.devices()[:4]))
    assert dataset.seq_length <= model.max_sequence_length


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_command_of_the_header_parses(path, monkeypatch):
    """The header begins with the command, then names the hardware, the time and the result."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_NAME"):
        monkeypatch.setenv(name, "x")
    header = "\n".join(line.removeprefix("#") for line in path.read_text().splitlines() if line.startswith("#"))
    command = re.search(r"llama_train (--flagfile=.*?)\n\n", header, re.DOTALL)[1].replace("\\\n", " ")
    arguments = [argument.replace("'", "") for argument in command.split()]
    assert arguments[0] == f"--flagfile=configs/{path.name}"
    assert flags.parse(llama_train.FLAGS, ["llama_train", *arguments])
    for heading in ("hardware:", "time", "result"):
        assert heading in header.lower()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_recipe_states_its_learning_rates(path):
    """The contract's defaults, lr=0.01 and end_lr=0.001, destroy a trained model."""
    optimizer = parse(path).optimizer
    rates = optimizer[f"{optimizer.type}_optimizer"]
    assert rates.end_lr < rates.lr < 0.005
    if "finetune" in path.stem:
        assert rates.lr <= 1e-4 and rates.end_lr == pytest.approx(rates.lr / 10)


def test_each_command_of_the_guide_to_fine_tuning_has_rates_that_keep_the_model(monkeypatch):
    """With the variables of the guide's shell, and the rates of a flagfile where a command has none of its own."""
    monkeypatch.setenv("D", "/tmp/lvm")
    guide = (ROOT / "docs/finetune.md").read_text()
    shared = re.search(r'^TRAIN="(.*?)"$', guide, re.DOTALL | re.MULTILINE)[1]
    guide = guide.replace("\\\n", " ").replace("$TRAIN", " ".join(shared.split()))
    commands = re.findall(r"^ *python -m EasyLM.models.llama.llama_train (.*)$", guide, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        config = flags.parse(llama_train.FLAGS, ["llama_train", *command.split()])
        rates = config.optimizer.adamw_optimizer
        assert rates.end_lr <= rates.lr / 10 and rates.lr <= (3e-3 if config.lora.rank else 3e-4)


def test_flags_after_the_file_override_it():
    assert parse(ROOT / "configs/debug.flags", "--total_steps=3").total_steps == 3


@pytest.mark.slow
def test_debug_trains(tmp_path):
    config = parse(ROOT / "configs/debug.flags", f"--logger.output_dir={tmp_path}", "--logger.experiment_id=run")
    llama_train.main(config)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(9.06, abs=0.01) and losses[-1] < 6
