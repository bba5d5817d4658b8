"""The flags are a contract: names, defaults, and what a wrong one says."""

import subprocess
import sys

import pytest

from EasyLM import flags
from EasyLM.errors import UserError, choose
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
CONTRACT = {
    "seed": 42,
    "mesh_dim": "1,-1,1",
    "dtype": "fp32",
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
    "peak_tflops": 0.0,
    "tokenizer": {"vocab_file": "", "add_bos_token": False, "add_eos_token": False},
    "train_dataset": DATASET,
    "eval_dataset": DATASET,
    "optimizer": {
        "accumulate_gradient_steps": 1,
        "type": "adamw",
        "adamw_optimizer": {
            "init_lr": 0.0,
            "end_lr": 0.001,
            "lr": 0.01,
            "lr_warmup_steps": 2000,
            "lr_decay_steps": 500000,
            "b1": 0.9,
            "b2": 0.95,
            "clip_gradient": 1.0,
            "weight_decay": 1e-4,
            "bf16_momentum": False,
            "multiply_by_parameter_scale": False,
        },
        "palm_optimizer": {
            "lr": 0.01,
            "lr_warmup_steps": 10000,
            "b1": 0.9,
            "b2": 0.99,
            "clip_gradient": 1.0,
            "weight_decay": 1e-4,
            "bf16_momentum": False,
        },
    },
    "checkpointer": {"float_dtype": "", "save_optimizer_state": False},
    "llama": dict.fromkeys(llama_config.FIELDS),
    "logger": {
        "online": False,
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
    },
}


def test_training_flags_and_defaults_are_the_contract():
    assert flags.defaults(llama_train.DEFINITIONS).to_dict() == CONTRACT


def test_every_flag_says_what_it_does():
    for name, flag in flags.leaves(llama_train.DEFINITIONS).items():
        assert len(flag.help) > 10, name


def test_environment_variables_expand(monkeypatch):
    monkeypatch.setenv("LVM_NODES", "4")
    assert flags.expand_variables("mesh_dim", "$LVM_NODES,-1,${LVM_NODES}") == "4,-1,4"
    assert flags.expand_variables("total_steps", 3) == 3
    with pytest.raises(UserError, match=r"--mesh_dim=\$LVM_UNSET: the environment variable LVM_UNSET is not set"):
        flags.expand_variables("mesh_dim", "$LVM_UNSET")


def test_choose_lists_the_choices():
    with pytest.raises(UserError, match=r"--kind='vidoe': choose one of 'paired', 'video'"):
        choose("--kind", "vidoe", ("paired", "video"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["--total_stepz=3"], 1, ["total_stepz", "Did you mean", "total_steps"]),
        (["--total_steps=many"], 1, ["total_steps", "many"]),
        (["--dtype=fp8"], 1, ["dtype", "fp8", "fp32|bf16|fp16"]),
        (["3"], 2, ["unexpected argument '3'"]),
    ],
)
def test_a_wrong_command_line_ends_with_one_clear_line(arguments, code, said):
    command = [sys.executable, "-m", "EasyLM.models.llama.llama_train", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr
    assert all(part in ended.stderr for part in said), ended.stderr
