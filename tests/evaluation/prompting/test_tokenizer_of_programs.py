"""Each program that uses a model takes the tokenizer that the model was trained with, or ends before it is loaded."""

import json
import pathlib

import pytest
from runs_kit import write_clip, write_line_examples
from tokenizer_kit import run_main, tiny_vqgan

from EasyLM.errors import UserError
from evaluation import batch_generation, demo, eval_perplexity, eval_video_perplexity, fewshot, generate_videos, serve

DEMO_MODEL = pathlib.Path(demo.FLAGS["checkpoint"].default)
OTHER = "0123456789abcdef"
PROGRAMS = (eval_perplexity, batch_generation, eval_video_perplexity, generate_videos, fewshot, serve, demo)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """The flags of all programs that name inputs and outputs, and those of a small tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    write_clip(folder / "clips" / "a", 20)
    return {
        **write_line_examples(folder),
        "input_files": f"{folder}/clips/*",
        "frame_input": True,
        "output_dir": str(folder / "videos"),
        "output_base_dir": str(folder / "answers"),
        "benchmark": "rendered",
        "tasks": "depth",
        "n_queries": 1,
        "vqgan": tiny_vqgan(folder / "vqgan"),
    }


@pytest.mark.parametrize(
    "name, forgotten, message",
    [
        pytest.param(
            OTHER, False, f"wrong tokenizer: .* was trained with the tokenizer {OTHER}", marks=pytest.mark.slow
        ),
        pytest.param(
            OTHER, True, f"--vqgan is missing: .* was trained with the tokenizer {OTHER}", marks=pytest.mark.slow
        ),
        (None, True, "--vqgan is missing: .* does not name the tokenizer"),
    ],
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_another_tokenizer_is_refused(program, name, forgotten, message, inputs, tmp_path):
    """`name`: of the tokenizer, in a checkpoint without weights. `forgotten`: the flag --vqgan."""
    settings = json.loads((DEMO_MODEL / "config.json").read_text()) | {"tokenizer": name}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    flags = {key: value for key, value in inputs.items() if key in program.FLAGS}
    flags |= {"checkpoint": str(tmp_path), "vqgan": "" if forgotten else flags["vqgan"]}
    with pytest.raises(UserError, match=message):
        run_main(program, **flags)
