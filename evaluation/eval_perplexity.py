"""Perplexity of true answers: `python -m evaluation.eval_perplexity --checkpoint=C --input_file=J --input_base_dir=D`.

A line of J is `{"input": [paths], "target": [paths]}`: the prompt (examples and query) and what should follow it. An
example's perplexity is exp(mean negative log-likelihood) of its target's tokens, given all tokens before each; the
figure is the mean over the examples.
"""

import numpy as np

from EasyLM.flags import Flag, run
from evaluation import examples, runners
from evaluation.prompter import PROMPTER_FLAGS
from tokenizer import images

FLAGS = {
    **PROMPTER_FLAGS,
    **examples.LINE_FLAGS,
    **examples.EXAMPLE_FLAGS,
    "batch_size": Flag(2, "Examples at a time, over all devices; changes no result."),
}


def main(config) -> None:
    """Measures every line, prints and writes the figures."""
    runners.check(config, "batch_size", "n_workers")
    lines = examples.read_lines(config, target="needed")

    def load(line, side):
        return tuple(np.stack([images.load(path, side) for path in paths]) for paths in (line.inputs, line.targets))

    runners.measure(config, lines, load, lambda line: (len(line.inputs), len(line.targets)))


if __name__ == "__main__":
    run(main, FLAGS)
