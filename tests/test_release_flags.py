"""The flags of the LVM release's programs are accepted; an ignored one is reported once."""

import importlib

import pytest
from absl.flags import IllegalFlagValueError

from EasyLM import flags
from EasyLM.errors import UserError
from EasyLM.models.llama import llama_train, training_task
from tokenizer import train_vqgan

RELEASE = {
    "evaluation.eval_perplexity": "input_file checkpoint input_base_dir batch_size=2 json_input_key=input "
    "json_target_key=target dtype=float16 torch_devices=0,1 n_workers=4 max_examples=0",
    "evaluation.batch_generation": "input_file checkpoint input_base_dir output_base_dir evaluate_mse=False "
    "json_input_key=input json_output_key=output json_target_key=target n_new_frames=1 n_candidates=2 "
    "context_frames=16 temperature=1.0 top_p=1.0 n_workers=8 dtype=float16 torch_devices=0 batch_size_factor=4 "
    "max_examples=0 resize_output=256,256 include_input=False",
    "evaluation.eval_video_perplexity": "checkpoint input_files frame_input=False read_file_list center_crop=1.0 "
    "n_context_frames=15 n_target_frames=1 n_workers=8 stride=8 batch_size=2 torch_devices=0 shuffle=False "
    "random_start=True max_examples=0",
    "evaluation.generate_videos": "checkpoint input_files frame_input=False read_file_list output_dir center_crop=1.0 "
    "n_context_frames=12 n_new_frames=4 n_candidates=8 temperature=1.0 top_p=1.0 n_workers=8 stride=8 batch_size=32 "
    "torch_devices=0 shuffle=False max_examples=0",
    "EasyLM.models.llama.convert_easylm_to_hf": "load_checkpoint model_size=vqlm_1b output_dir",
    "EasyLM.models.llama.llama_train": "seed=42 dtype=bfloat16 llama.use_cache=True llama.vocab_size=8292 "
    "llama.remat_block= llama.scan_mlp=True checkpointer.float_dtype=bf16 checkpointer.save_optimizer_state=False "
    "jax_distributed.local_device_ids=0,1 logger.prefix_to_id=False",
}


@pytest.mark.parametrize("command", RELEASE)
def test_flags_of_the_release_are_accepted(command, capsys):
    """Each flag of the release's programs, with its default there. An ignored flag is reported once."""
    arguments = [f"--{item}" if "=" in item else f"--{item}=somewhere" for item in RELEASE[command].split()]
    config = flags.parse(importlib.import_module(command).FLAGS, [command, *arguments])
    notes = capsys.readouterr().err.splitlines()
    ignored = {"torch_devices": 1, "llama.use_cache": 1, "batch_size": int(command.endswith("generate_videos"))}
    for name, count in ignored.items():
        given = any(argument.startswith(f"--{name}=") for argument in arguments)
        assert sum(note.startswith(f"note: --{name}: Ignored") for note in notes) == count * given, name
    assert config.get("dtype") in (None, "auto", "fp32", "bf16")
    assert "torch_devices" not in config


@pytest.mark.parametrize(("given", "computed"), [("float16", "bf16"), ("float32", "fp32"), ("bf16", "bf16")])
def test_names_of_types_in_the_release(given, computed, capsys):
    command = importlib.import_module("evaluation.eval_perplexity")
    config = flags.parse(command.FLAGS, ["program", "--input_file=a", "--checkpoint=b", f"--dtype={given}"])
    assert config.dtype == computed
    assert capsys.readouterr().err == (f"note: --dtype={given} means {computed}\n" if given != computed else "")


def test_every_spelling_of_fp16_is_refused_in_training_and_no_other_type():
    refused = set()
    spellings = {*training_task.COMPUTE_DTYPES, *flags.DTYPE_ALIASES}
    for given in spellings:
        config = flags.parse(llama_train.FLAGS, ["program", f"--dtype={given}"])
        try:
            training_task.read_model(config)
        except UserError as error:
            assert str(error).startswith("--dtype=fp16: small gradients underflow to zero")
            refused.add(given)
    assert refused == {"fp16", "float16"} and len(spellings) == 6


@pytest.mark.parametrize("given", ["fp16", "float16"])
def test_tokenizers_are_not_trained_in_fp16(given):
    with pytest.raises(IllegalFlagValueError, match=f"--dtype={given}: value should be one of <fp32.bf16>"):
        flags.parse(train_vqgan.FLAGS, ["program", "--input_dirs=a", f"--dtype={given}"])
