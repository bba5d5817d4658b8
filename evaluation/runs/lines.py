"""Examples of a JSONL file with lines `{"input": [paths], "target": [paths], "output": path}`.

Keys that a command does not use may be omitted.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from EasyLM.errors import UserError, prefix_errors
from EasyLM.flags import Flag
from EasyLM.storage import parse_json, read_text_lines

LINE_FLAGS = {
    "input_file": Flag("", "JSONL file, one example per line.", required=True),
    "input_base_dir": Flag("", "Folder that image paths are relative to; empty: the current folder."),
    "json_input_key": Flag("input", "Key of a line's list of prompt images."),
    "json_target_key": Flag("target", "Key of a line's list of target images."),
}


@dataclasses.dataclass(frozen=True)
class Line:
    """An example of a JSONL file. Image paths include the base folder.

    Attributes:
      name: FILE:LINE.
      inputs: images of the prompt.
      targets: images to compare with; empty if the command does not use them.
      output: output path, as in the line.
      named_targets: all paths under the target key, even if unused. Outputs must not overwrite them.
    """

    name: str
    inputs: tuple[str, ...]
    targets: tuple[str, ...] = ()
    output: str = ""
    named_targets: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        return self.inputs + self.targets

    @property
    def parameters(self) -> tuple:
        return len(self.inputs), self.output

    @property
    def lengths(self) -> tuple[int, int]:
        """Images of the prompt and of the target."""
        return len(self.inputs), len(self.targets)


@dataclasses.dataclass(frozen=True)
class LineFormat:
    """How lines are parsed.

    Attributes:
      base_dir: folder that image paths are relative to.
      input_key, target_key: keys of the lists of paths.
      output_key: key of the output path; empty: lines have no outputs.
      targets: "required", "optional" or "unused".
    """

    base_dir: str = ""
    input_key: str = "input"
    target_key: str = "target"
    output_key: str = ""
    targets: str = "unused"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, targets: str, output_key: str = "") -> "LineFormat":
        """Creates the format from values of LINE_FLAGS."""
        return cls(config["input_base_dir"], config["json_input_key"], config["json_target_key"], output_key, targets)


def read_lines(path: str, line_format: LineFormat, max_examples: int = 0) -> list[Line]:
    """Returns the examples of a JSONL file, at most `max_examples` (0: all). Empty lines are skipped.

    Raises:
      UserError: naming FILE:LINE and what is wrong with the line, or that the file has no lines.
    """
    lines: list[Line] = []
    for number, text in read_text_lines(path):
        if max_examples and len(lines) == max_examples:
            break
        name = f"{path}:{number}"
        with prefix_errors(name):
            lines.append(_parse(name, text, line_format))
    if not lines:
        raise UserError(f"--input_file={path}: has no examples")
    return lines


def _parse(name: str, text: str, line_format: LineFormat) -> Line:
    values = parse_json(text)
    inputs = _image_paths(values, line_format.input_key, line_format.base_dir)
    targets: tuple[str, ...] = ()
    key = line_format.target_key
    if line_format.targets == "required" or (line_format.targets == "optional" and key in values):
        targets = _image_paths(values, key, line_format.base_dir)
    output = values.get(line_format.output_key, "") if line_format.output_key else ""
    if line_format.output_key and not (isinstance(output, str) and output):
        raise UserError(f"{line_format.output_key!r} must be the path of an image to write, not {output!r}")
    named = values.get(key)
    named = [path for path in named if isinstance(path, str)] if isinstance(named, list) else []
    return Line(name, inputs, targets, output, tuple(os.path.join(line_format.base_dir, path) for path in named))


def _image_paths(values: dict, key: str, base_dir: str) -> tuple[str, ...]:
    value = values.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(path, str) and path for path in value):
        raise UserError(f"{key!r} must be a list of paths of images, not {value!r}")
    paths = tuple(os.path.join(base_dir, path) for path in value)
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{key}: no such file: {path}")
    return paths
