"""Generates answers: `python -m evaluation.batch_generation --checkpoint=C --input_file=J --output_base_dir=O`.

Each line of J is `{"input": [paths], "output": path}`. `--evaluate_mse` compares with `"target": [paths]`, one path per
generated image. The file at `output` has one row per candidate: its generated images side by side. `--include_input`
puts the prompt before them. With several candidates, each candidate also has a file of its own: `answer_0.png`,
`answer_1.png`, ... beside `answer.png`.
"""

import numpy as np
from ml_collections import ConfigDict

from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag, run
from evaluation.prompting import PROMPTER_FLAGS, GenerationSettings
from evaluation.runs import EXAMPLE_FLAGS, GENERATION_FLAGS, LINE_FLAGS, EvaluationRun, Line, loops, read_lines
from evaluation.runs.lines import LineFormat
from evaluation.runs.sample_files import LineOutputs, parse_size
from tokenizer.media import images

FLAGS = {
    **PROMPTER_FLAGS,
    **LINE_FLAGS,
    "json_output_key": Flag("output", "Key of the output path in a line."),
    **EXAMPLE_FLAGS,
    "output_base_dir": Flag("", "Folder that output paths are relative to.", required=True),
    **GENERATION_FLAGS,
    "batch_size_factor": Flag(
        4,
        "Examples in a batch for each device (with mp > 1 in --mesh_dim: for each mp devices). Changes no result.",
        least=1,
    ),
    "resize_output": Flag(
        "",
        "Size of each image: original (the size of the last input) or WIDTHxHEIGHT; empty: the tokenizer's resolution.",
    ),
    "include_input": Flag(False, "Put the prompt before the answer."),
}


def main(config: ConfigDict) -> None:
    """Generates the images of every line; prints and writes the metrics."""
    settings = GenerationSettings.from_user(config)
    with prefix_errors(f"--resize_output={config.resize_output}"):
        size = parse_size(config.resize_output)
    outputs = LineOutputs(config.output_base_dir, config.n_candidates, size, config.include_input)
    targets = "optional" if config.evaluate_mse else "unused"
    line_format = LineFormat.from_config(config, targets=targets, output_key=config.json_output_key)
    lines = read_lines(config.input_file, line_format)
    outputs.check(lines)  # all lines: an output must not overwrite an image of a line that --max_examples leaves out
    lines = lines[: config.max_examples or None]
    _check_targets(config, lines)
    loops.generate(
        EvaluationRun.from_config(config, config.batch_size_factor, lines, _load, lambda line: line.lengths),
        settings,
        outputs.save,
        output_dir=config.output_base_dir,
        list_path=config.input_file,
        evaluate_mse=config.evaluate_mse,
    )


def _check_targets(config: ConfigDict, lines: list[Line]) -> None:
    for line in lines:
        if line.targets and len(line.targets) != config.n_new_frames:
            raise UserError(
                f"{line.name}: {len(line.targets)} images in {config.json_target_key!r}, "
                f"--n_new_frames={config.n_new_frames}"
            )
    if config.evaluate_mse and not any(line.targets for line in lines):
        raise UserError(f"--evaluate_mse: no line of {config.input_file} has {config.json_target_key!r}")


def _load(line: Line, side: int) -> tuple[np.ndarray, np.ndarray | None]:
    prompt, target = ([images.load(path, side) for path in paths] for paths in (line.inputs, line.targets))
    return np.stack(prompt), np.stack(target) if target else None


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
