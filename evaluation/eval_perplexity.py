"""Perplexity of true answers: `python -m evaluation.eval_perplexity --checkpoint=C --input_file=J --input_base_dir=D`.

A line of J is `{"input": [paths], "target": [paths]}`: the prompt (examples and query) and what should follow it. An
example's perplexity is exp(mean negative log-likelihood) of its target's tokens, given all tokens before each; the
figure is the mean over the examples.
"""

import numpy as np

from EasyLM.flags import Flag, run
from evaluation.prompting.prompter import PROMPTER_FLAGS
from evaluation.runs import loops
from evaluation.runs.lines import EXAMPLE_FLAGS, LINE_FLAGS, read_lines
from tokenizer.media import images

FLAGS = {
    **PROMPTER_FLAGS,
    **LINE_FLAGS,
    **EXAMPLE_FLAGS,
    "batch_size": Flag(2, "Examples at a time, over all devices; changes no result."),
}


def main(config) -> None:
    """Measures every line, prints and writes the figures."""
    loops.check(config, "batch_size", "n_workers")
    lines = read_lines(config, target="needed")

    def load(line, side):
        return tuple(np.stack([images.load(path, side) for path in paths]) for paths in (line.inputs, line.targets))

    loops.measure(config, lines, load, lambda line: (len(line.inputs), len(line.targets)))


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
