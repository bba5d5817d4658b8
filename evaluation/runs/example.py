"""The `Example` protocol, and the flags of every evaluation run."""

from typing import Protocol

from EasyLM.flags import Flag

EXAMPLE_FLAGS = {
    "max_examples": Flag(0, "Largest number of examples; 0: all.", least=0),
    "n_workers": Flag(8, "Threads that load images.", least=1),
    "output_json": Flag("", "Write the metrics, in total and per example, to this file."),
}


class Example(Protocol):
    """A prompt with its target or output paths.

    Attributes:
      name: identifies the example in messages and results, such as FILE:LINE.
      files: the files that its result depends on.
      parameters: other JSON values that its result depends on.
    """

    @property
    def name(self) -> str: ...

    @property
    def files(self) -> tuple[str, ...]: ...

    @property
    def parameters(self) -> tuple: ...
