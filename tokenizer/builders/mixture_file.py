"""A file that names the data sets of one build: `tokenizer.build --inputs=mix.yaml`.

- {kind: paired, input_dir: 'depth/{000..019}.tar', keys: 'jpg,depth.png', weight: 2}
- {kind: video, input_dir: clips, n_frames: 8, weight: 1}
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from ml_collections import ConfigDict

from EasyLM import flags
from EasyLM.errors import UserError, nearest_names, prefix_errors
from EasyLM.flags import Flag

_MOST_BYTES = 1 << 20
_TRUTHS = {"true": True, "True": True, "false": False, "False": False}
_PARSERS: dict[type, tuple[Callable[[str], Any], str]] = {
    str: (str, "a text"),
    int: (int, "an integer"),
    float: (float, "a number"),
    bool: (_TRUTHS.__getitem__, "true or false"),
}
_REQUIRED = ("kind", "input_dir")


class _TextLoader(yaml.SafeLoader):
    """Loads every value as a text. YAML 1.1 converts 0123 to 83, 1:30 to 90, `no` to False, and dates."""


_TextLoader.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # `<<`, which merges mappings


@dataclasses.dataclass(frozen=True)
class Entry:
    """A data set of the file.

    Attributes:
      source_line: FILE:LINE, for messages.
      config: the command's settings with those of the data set.
      own: the fields of the data set, without its weight.
      weight: its share of the examples, in proportion to the others; None: none has one.
    """

    source_line: str
    config: ConfigDict
    own: Mapping[str, Any]
    weight: float | None


def read_entries(path: str, definitions: Mapping[str, Flag], config: ConfigDict) -> list[Entry]:
    """Reads a YAML list of data sets.

    Args:
      path: the file.
      definitions: the flags that a data set may set.
      config: the command's settings, which hold where a data set has none.

    Raises:
      UserError: naming FILE:LINE and the field, if the file does not have this form.
    """
    with prefix_errors(f"--inputs={path}"):
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(_MOST_BYTES + 1)
            if len(text) > _MOST_BYTES:
                raise UserError(f"has more than {_MOST_BYTES >> 20} MiB")
            root = yaml.compose(text, yaml.SafeLoader)
            values = yaml.load(text, _TextLoader)
        except FileNotFoundError:
            raise UserError("no such file") from None
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})") from None
        except UserError:
            raise
        except (yaml.YAMLError, RecursionError, ValueError) as error:  # such as the date 2024-02-30
            raise UserError(f"not YAML ({' '.join(str(error).split())})") from None
        if not isinstance(values, list) or not values:
            raise UserError("must be a list of data sets, each a mapping such as {kind: images, input_dir: DIR}")
    assert root is not None
    entries = []
    for node, fields in zip(root.value, values):
        source_line = f"{path}:{node.start_mark.line + 1}"
        with prefix_errors(source_line):
            names = [key.value for key, _ in node.value] if isinstance(fields, dict) else []
            entries.append(_entry(source_line, fields, names, definitions, config))
    weighted = [entry for entry in entries if entry.weight is not None]
    if len(weighted) not in (0, len(entries)):
        source_line = next(entry.source_line for entry in entries if entry.weight is None)
        other = weighted[0].source_line
        raise UserError(f"{source_line}: has no weight, but {other} has one: give all data sets a weight, or none")
    return entries


def _entry(
    source_line: str, fields: Any, names: list[Any], definitions: Mapping[str, Flag], config: ConfigDict
) -> Entry:
    if not isinstance(fields, dict):
        raise UserError("must be a mapping such as {kind: images, input_dir: DIR}")
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"repeats the field {repeated.pop()}")
    choices = [*definitions, "weight"]
    for name, value in fields.items():
        if name not in choices:
            nearest = nearest_names(str(name), choices)
            hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"choose of {', '.join(choices)}"
            if not value:  # the rest of {keys: jpg,seg.png}
                hint = "in braces, a value with commas needs quotes, such as keys: 'jpg,seg.png'"
            raise UserError(f"{name}: no such field; {hint}")
    if missing := [name for name in _REQUIRED if not fields.get(name)]:
        raise UserError(f"{' and '.join(missing)}: missing")
    weight = _weight(fields["weight"]) if "weight" in fields else None
    own = {name: _value(name, definitions[name], value) for name, value in fields.items() if name != "weight"}
    changed = ConfigDict({**config, **own})
    flags.validate(definitions, changed)
    return Entry(source_line, changed, own, weight)


def _weight(value: Any) -> float:
    with contextlib.suppress(ValueError, TypeError):
        weight = int(value) if str(value).isdigit() else float(value)
        if 0 < weight < math.inf:
            return weight
    raise UserError(f"weight={value}: must be a number above 0")


def _value(name: str, flag: Flag, value: Any) -> Any:
    """Parses the text of a field as that of a flag."""
    parse, wanted = _PARSERS[flag.value_type]
    try:
        if not isinstance(value, str):
            raise ValueError
        return flags.expand_variables(name, parse(value))
    except (ValueError, KeyError):
        raise UserError(f"{name}={value}: must be {wanted}") from None
