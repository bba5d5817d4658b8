"""Perplexity of target images: `python -m evaluation.eval_perplexity --checkpoint=C --input_file=J --input_base_dir=D`.

Each line of J is `{"input": [paths], "target": [paths]}`: the prompt and the images that follow it. The perplexity of
an example is exp(mean negative log-likelihood) of its target's tokens, each token given all tokens before it.
The reported metric is the mean over the examples.
"""

import numpy as np
from ml_collections import ConfigDict

from EasyLM.flags import Flag, run
from evaluation.prompting import PROMPTER_FLAGS
from evaluation.runs import EXAMPLE_FLAGS, LINE_FLAGS, EvaluationRun, Line, loops, read_lines
from evaluation.runs.lines import LineFormat
from tokenizer.media import images

FLAGS = {
    **PROMPTER_FLAGS,
    **LINE_FLAGS,
    **EXAMPLE_FLAGS,
    "batch_size": Flag(2, "Examples per batch, over all devices; does not change results.", least=1),
}


def main(config: ConfigDict) -> None:
    """Measures every line; prints and writes the metrics."""
    line_format = LineFormat.from_config(config, targets="required")
    lines = read_lines(config.input_file, line_format, config.max_examples)
    loops.measure(EvaluationRun.from_config(config, config.batch_size, lines, _load, lambda line: line.lengths))


def _load(line: Line, side: int) -> tuple[np.ndarray, np.ndarray]:
    prompt, target = (np.stack([images.load(path, side) for path in paths]) for paths in (line.inputs, line.targets))
    return prompt, target


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
