"""The programs that answer or score prompts, and small inputs for them."""

import pathlib

from runs_kit import write_clip, write_line_examples

_LINES = "--input_file={0}/lines.jsonl --input_base_dir={0}/in"
_CLIPS = "--input_files={0}/clips/* --frame_input=True"
# Program -> the flags that it needs besides a model and a tokenizer. Inputs are in the folder {0}, outputs in {1}.
PROGRAMS = {
    "evaluation.eval_perplexity": _LINES,
    "evaluation.batch_generation": f"{_LINES} --output_base_dir={{1}}/out",
    "evaluation.eval_video_perplexity": f"{_CLIPS} --n_context_frames=1",
    "evaluation.generate_videos": f"{_CLIPS} --n_context_frames=1 --output_dir={{1}}/out",
    "evaluation.fewshot": "--input_dirs={0}/in --target_dirs={0}/in",
    "evaluation.demo": "",
    "evaluation.serve": "",
}


def write_inputs(folder: pathlib.Path) -> None:
    """Writes the inputs of all programs."""
    write_line_examples(folder)
    write_clip(folder / "clips" / "a", 2)
