"""The flags of the commands are a contract: names, defaults, help, and where outputs may be written."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest

from EasyLM import errors, flags
from EasyLM.errors import UserError
from EasyLM.models.llama import llama_config, llama_train

DATASET = {
    "type": "json",
    "text_processor": {
        "fields_from_example": "",
        "fields": "",
        "subfield_separator": " ",
        "add_bos_token": False,
        "add_eos_token": False,
        "prepend_text": "",
        "base64_token_dtype": "i4",
    },
    "json_dataset": {
        "path": "",
        "seq_length": 1024,
        "batch_size": 8,
        "always_start_with_bos": False,
        "document_mask": False,
        "start_seek_loc": 0,
        "weights": "",
        "example_index_at_start": 0,
        "tokens_count_at_start": 0,
        "tokenizer_processes": 1,
        "tokenizer_parallel_chunk_size": 32,
        "tokenizer_parallel_batch_size": 1024,
        "throughput_average_window_size": 200,
        "shuffle_seed": -1,
        "skip_bad_lines": False,
    },
    "huggingface_dataset": {
        "path": "c4",
        "name": "en",
        "split": "train",
        "streaming": False,
        "seq_length": 1024,
        "batch_size": 8,
        "always_start_with_bos": False,
        "batch_token_dtype": "i4",
    },
}
SCHEDULED_OPTIMIZER = {
    "schedule": "cosine",
    "init_lr": 0.0,
    "end_lr": 0.001,
    "lr": 0.01,
    "lr_warmup_steps": 2000,
    "lr_decay_steps": 500000,
    "wsd_decay_steps": 50000,
    "b1": 0.9,
    "b2": 0.95,
    "clip_gradient": 1.0,
    "weight_decay": 1e-4,
    "weight_decay_mask": False,
    "bf16_momentum": False,
}
RETENTION = {"keep_latest": 1, "keep_every": 0}
CONTRACT = {
    "seed": 42,
    "mesh_dim": "1,-1,1",
    "dtype": "fp32",
    "gradient_reduce_dtype": "",
    "total_steps": 10000,
    "load_llama_config": "",
    "update_llama_config": "",
    "load_checkpoint": "",
    "load_dataset_state": "",
    "load_metadata": "",
    "log_freq": 50,
    "save_model_freq": 0,
    "save_milestone_freq": 0,
    "eval_steps": 0,
    "log_all_worker": False,
    "max_nonfinite_steps": 10,
    "watchdog_minutes": 30.0,
    "preemption_notice_seconds": 0.0,
    "compilation_cache_dir": "",
    "profile_steps": "",
    "peak_tflops": 0.0,
    "tokenizer": {"vocab_file": "", "add_bos_token": False, "add_eos_token": False},
    "train_dataset": DATASET,
    "eval_dataset": DATASET,
    "optimizer": {
        "accumulate_gradient_steps": 1,
        "type": "adamw",
        "ema_decay": 0.0,
        "adamw_optimizer": {**SCHEDULED_OPTIMIZER, "multiply_by_parameter_scale": False},
        "palm_optimizer": {
            "lr": 0.01,
            "lr_warmup_steps": 10000,
            "b1": 0.9,
            "b2": 0.99,
            "clip_gradient": 1.0,
            "weight_decay": 1e-4,
            "weight_decay_mask": False,
            "bf16_momentum": False,
        },
        "muon_optimizer": {**SCHEDULED_OPTIMIZER, "momentum": 0.95},
    },
    "checkpointer": {"float_dtype": "", "save_optimizer_state": False, **RETENTION, "format": "auto"},
    "llama": dict.fromkeys(llama_config.FLAG_OF_FIELD),
    "lora": {
        "rank": 0,
        "alpha": 0.0,
        "dropout": 0.0,
        "targets": "q_proj,k_proj,v_proj,o_proj,gate_proj,down_proj,up_proj",
    },
    "logger": {
        "online": False,
        "wandb": True,
        "tensorboard": False,
        "prefix": "",
        "project": "lvm",
        "output_dir": "runs",
        "wandb_dir": "",
        "random_delay": 0.0,
        "experiment_id": "",
        "anonymous": "",
        "notes": "",
        "entity": "",
        "prefix_to_id": False,
    },
    "jax_distributed": {
        "initialize_jax_distributed": False,
        "coordinator_address": None,
        "num_processes": None,
        "process_id": None,
        "local_device_ids": None,
        "initialization_timeout": 300,
        "heartbeat_timeout_seconds": 100,
        "shutdown_timeout_seconds": 30,
    },
}


def test_training_flags_and_defaults_are_the_contract():
    assert flags.defaults(llama_train.FLAGS).to_dict() == CONTRACT


ROOT = pathlib.Path(__file__).parent.parent
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("EasyLM", "tokenizer", "evaluation")
    for path in (ROOT / package).rglob("*.py")
    if "\ndef cli()" in path.read_text()
)


@pytest.mark.parametrize("name, nearest", [
    ("total_stepz", ["total_steps"]),
    ("json_dataset.path", ["train_dataset.json_dataset.path", "eval_dataset.json_dataset.path"]),
    ("xyzzy", []),
])  # fmt: skip
def test_a_misspelt_name_leads_to_the_nearest_flags(name, nearest):
    names = list(flags.leaves(llama_train.FLAGS))
    assert set(nearest) <= set(errors.nearest_names(name, names))
    assert bool(nearest) == bool(errors.nearest_names(name, names))


@pytest.mark.parametrize("option", ["--help", "-h", "--helpfull"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, option, monkeypatch, capsys):
    """It shows usage, description, and each flag with its default; each flag's help is a sentence."""
    module = importlib.import_module(command)
    monkeypatch.setattr(sys, "argv", [command, option])
    with pytest.raises(SystemExit) as exited:
        module.cli()
    assert exited.value.code == 0
    text = capsys.readouterr().out
    program = command.removesuffix(".__main__")
    assert text.startswith(f"usage: python -m {program} --flag=value ...\n\n{module.__doc__.strip().splitlines()[0]}")
    for name, flag in flags.leaves(module.FLAGS).items():
        assert len(flag.help) > 10, name
        assert f"\n  --{name}=" in text
    assert "absl" not in text
    assert "--flagfile=FILE" in text


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_help_of_every_script(path):
    if "def cli()" not in path.read_text():
        pytest.skip("a module of other scripts")
    command = [sys.executable, str(path), "--help"]
    completed = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert completed.stdout.startswith(f"usage: python {path} --flag=value ...")


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_in_range(command):
    module = importlib.import_module(command)
    for name, flag in flags.leaves(module.FLAGS).items():
        assert flag.allows(flag.default), name
        assert flag.choices is None or flag.default in (None, *flag.choices), name
        assert set(flag.aliases.values()) <= set(flag.choices or ()), name


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "tokenizer.build"])
def test_outputs_on_an_object_store_are_refused(command):
    """Except run directories and builds. Otherwise a local folder named gs: would appear."""
    module = importlib.import_module(command)
    for name in flags.leaves(module.FLAGS):
        if name.startswith("output"):
            config = flags.defaults(module.FLAGS)
            for required, other in flags.leaves(module.FLAGS).items():
                if other.required:
                    config[required] = "somewhere"
            config[name] = "gs://bucket/output"
            with pytest.raises(UserError, match=f"--{name}=gs://bucket/output: must be a local path"):
                flags.validate(module.FLAGS, config)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_protocol_is_named_with_its_flag(command):
    """In every flag that can be a path, also after a prefix and in a comma list."""
    module = importlib.import_module(command)
    required = {name: "somewhere" for name, flag in flags.leaves(module.FLAGS).items() if flag.required}
    values = ("foo://a/b", "params::foo://a/b", "somewhere,foo://a/b.jsonl")
    for name, flag in flags.leaves(module.FLAGS).items():
        if flag.value_type is not str or flag.choices or flag.ignored or name == "logger.notes":
            continue
        for value in values:
            config = flags.defaults(module.FLAGS)
            config.update_from_flattened_dict(required | {name: value})
            is_local = name.startswith("output") and not flag.may_be_remote
            reason = "must be a local path" if is_local else "unknown protocol foo://; known are gs, s3, "
            with pytest.raises(UserError, match=f"^--{re.escape(f'{name}={value}')}: {reason}"):
                flags.validate(module.FLAGS, config)


def test_a_protocol_in_a_text_is_not_checked():
    config = flags.defaults(llama_train.FLAGS)
    config.logger.notes, config.update_llama_config = "foo://a/b", "dict(a='foo://a/b')"
    config.train_dataset.json_dataset.path = "memory://a/b.jsonl,data:v2/a.jsonl"
    flags.validate(llama_train.FLAGS, config)
