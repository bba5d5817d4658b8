"""What an evaluation run knows of an example, and the flags of every run."""

from typing import Protocol

from EasyLM.flags import Flag

EXAMPLE_FLAGS = {
    "max_examples": Flag(0, "Use the first examples only; 0: all.", least=0),
    "n_workers": Flag(8, "Threads that read images.", least=1),
    "output_json": Flag("", "Write the metrics, in total and per example, to this file."),
}


class Example(Protocol):
    """A prompt and what follows it.

    Attributes:
      name: identifies the example in messages and results, as FILE:LINE.
      files: the files that its result depends on.
      parameters: other JSON values that its result depends on.
    """

    @property
    def name(self) -> str: ...

    @property
    def files(self) -> tuple[str, ...]: ...

    @property
    def parameters(self) -> tuple: ...
