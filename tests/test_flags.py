"""The flags are a contract: names, defaults, ranges, help and error messages."""

import importlib
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

import EasyLM
from EasyLM import flags
from EasyLM.errors import UserError
from EasyLM.flags import Flag
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
EXAMPLE = {
    "rate": Flag(0.5, "A number.", least=0, below=1),
    "port": Flag(80, "A port.", least=0, most=65535),
    "size": Flag(2.0, "A size.", above=0),
    "count": Flag(None, "A count.", type=int, least=1),
    "group": {
        "output_dir": Flag("", "Where to write.", required=True),
        "mode": Flag("a", "A mode.", choices=("a", "b")),
        "input_dir": Flag("", "Where to read.", required=True),
    },
}


def example(**values):
    config = flags.defaults(EXAMPLE)
    config.group.output_dir = config.group.input_dir = "somewhere"
    for name, value in values.items():
        config[name] = value
    return config


def test_a_number_outside_its_range_is_refused():
    flags.validate(EXAMPLE, example(rate=0.0, port=65535, size=math.inf, count=1))
    flags.validate(EXAMPLE, example(count=None))
    for name, value, rule in [
        ("rate", -0.1, "at least 0 and below 1"),
        ("rate", 1.0, "at least 0 and below 1"),
        ("rate", math.nan, "at least 0 and below 1"),
        ("port", -1, "0..65535"),
        ("port", 65536, "0..65535"),
        ("size", 0.0, "above 0"),
        ("size", math.nan, "above 0"),
        ("count", 2**63, "a 64-bit integer"),
        ("count", 0, "at least 1"),
    ]:
        with pytest.raises(UserError, match=re.escape(f"--{name}={value}: must be {rule}")):
            flags.validate(EXAMPLE, example(**{name: value}))


def test_nan_is_refused_without_a_range():
    definitions = {"x": Flag(0.0, "A number.")}
    config = flags.defaults(definitions)
    config.x = math.nan
    with pytest.raises(UserError, match="--x=nan: must be a number"):
        flags.validate(definitions, config)


def test_all_missing_flags_are_named_at_once():
    with pytest.raises(UserError, match=r"^--group\.output_dir, --group\.input_dir are missing$"):
        flags.validate(EXAMPLE, flags.defaults(EXAMPLE))


def test_a_value_outside_the_choices_is_refused():
    config = example()
    config.group.mode = "c"
    with pytest.raises(UserError, match=r"--group\.mode='c': choose one of 'a', 'b'"):
        flags.validate(EXAMPLE, config)


def test_help_shows_groups_defaults_ranges_and_required_flags_first():
    assert flags.help_text(test_help_shows_groups_defaults_ranges_and_required_flags_first, EXAMPLE).endswith(
        """
The flags are a contract: names, defaults, ranges, help and error messages.

flags:
  --rate=NUMBER  (default: 0.5; at least 0 and below 1)
      A number.
  --port=INTEGER  (default: 80; 0..65535)
      A port.
  --size=NUMBER  (default: 2.0; above 0)
      A size.
  --count=INTEGER  (default: none; at least 1)
      A count.

group flags:
  --group.output_dir=TEXT  (required)
      Where to write.
  --group.input_dir=TEXT  (required)
      Where to read.
  --group.mode=TEXT  (default: a; one of: a, b)
      A mode.

--flagfile=FILE reads flags from FILE, one per line; lines that start with # are comments."""
    )


def test_help_shows_a_space_and_lists_an_alias_once():
    definitions = {
        "separator": Flag(" ", "A separator."),
        "dtype": Flag("", "A type.", choices=("", "fp32", "float32"), aliases={"float32": "fp32"}),
    }
    text = flags.help_text(test_help_shows_a_space_and_lists_an_alias_once, definitions)
    assert "--separator=TEXT  (default: ' ')" in text
    assert "--dtype=TEXT  (default: empty; one of: empty, fp32; float32 means fp32)" in text


@pytest.mark.parametrize("name, nearest", [
    ("total_stepz", ["total_steps"]),
    ("json_dataset.path", ["train_dataset.json_dataset.path", "eval_dataset.json_dataset.path"]),
    ("xyzzy", []),
])  # fmt: skip
def test_a_misspelt_name_leads_to_the_nearest_flags(name, nearest):
    names = list(flags.leaves(llama_train.FLAGS))
    assert set(nearest) <= set(flags.nearest_names(name, names))
    assert bool(nearest) == bool(flags.nearest_names(name, names))


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


def test_help_is_silent_when_its_reader_has_closed_the_pipe():
    """As `head` does."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "tokenizer.pack", "--help"]
    completed = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write_end)
    assert (completed.returncode, completed.stderr) == (0, "")


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


def test_the_version_is_printed(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exited:
        flags.run(test_the_version_is_printed, EXAMPLE, ["program", "--version"])
    assert exited.value.code == 0
    assert capsys.readouterr().out == f"EasyLM-LVM {EasyLM.__version__}\n"


def test_environment_variables_expand(monkeypatch):
    monkeypatch.setenv("LVM_NODES", "4")
    assert flags.expand_variables("mesh_dim", "$LVM_NODES,-1,${LVM_NODES}") == "4,-1,4"
    assert flags.expand_variables("total_steps", 3) == 3
    monkeypatch.setenv("HOME", "/home/me")
    assert flags.expand_variables("path", "~/a.jsonl,~/b/*.jsonl,c~/d") == "/home/me/a.jsonl,/home/me/b/*.jsonl,c~/d"
    assert flags.expand_variables("load_checkpoint", "params::~/run/params") == "params::/home/me/run/params"
    assert flags.expand_variables("notes", "~ 3 runs, ~/ and a~b") == "~ 3 runs, ~/ and a~b"
    with pytest.raises(UserError, match=r"--mesh_dim=\$LVM_UNSET: the environment variable LVM_UNSET is not set"):
        flags.expand_variables("mesh_dim", "$LVM_UNSET")


PROGRAM = """
from EasyLM.flags import Flag, run
def main(config):
    print(config.group.text, config.steps)
run(main, {"steps": Flag(3, "Steps.", least=1), "group": {"text": Flag("", "A text.", required=True)},
           "dtype": Flag("fp32", "A type.", choices=("fp32", "bf16"))})
"""


@pytest.mark.parametrize(
    "arguments, code, parts",
    [
        (["--group.text=a$LVM_NAME"], 0, ["ab 3"]),
        (["--flagfile=FLAGFILE", "--steps=5"], 0, ["from a file 5"]),
        (["--flagfile=missing"], 1, ["error: Unable to open flagfile", "missing"]),
        (["--stepz=3"], 1, ["error: --stepz: no such flag; did you mean --steps?"]),
        (["--steps=many"], 1, ["steps", "many"]),
        (["--dtype=fp8"], 1, ["dtype", "fp8", "fp32|bf16"]),
        (["--group.text=x", "--steps=0"], 2, ["error: --steps=0: must be at least 1"]),
        (["--steps=3"], 2, ["error: --group.text is missing"]),
        (["3"], 2, ["unexpected argument '3'"]),
    ],
)
def test_command_line(arguments, code, parts, tmp_path, monkeypatch):
    """A valid command line runs; an invalid one prints one line and exits with the right code."""
    monkeypatch.setenv("LVM_NAME", "b")
    (tmp_path / "FLAGFILE").write_text("# a comment\n\n--group.text=from a file\n--steps=4\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    completed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    output = completed.stdout + completed.stderr
    assert completed.returncode == code, output
    assert len(output.splitlines()) == 1, output
    assert all(part in output for part in parts), output


def test_ctrl_c_ends_a_command_with_one_line(capsys):
    def main(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exited:
        flags.run(main, {}, ["program"])
    assert exited.value.code == 130 and capsys.readouterr().err == "\ninterrupted\n"


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
