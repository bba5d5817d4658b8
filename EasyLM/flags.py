"""Settings as nested dicts of `Flag`: each leaf an absl flag `--group.name=value`, all read into one `ConfigDict`.

Flags end at `main`: `run(main, definitions)` parses, and calls `main(config)` with values. Nothing below reads a flag.
"""

import dataclasses
import os
import re
import sys
from typing import Any

import ml_collections
from absl import app, flags

from EasyLM.errors import UserError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")
_DEFINERS = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}


@dataclasses.dataclass(frozen=True)
class Flag:
    """A setting: its default, what it does, for text the valid choices; `type` where the default is None."""

    default: Any
    help: str
    choices: tuple[str, ...] | None = None
    type: "type | None" = None  # quoted: by then the name means the default


def leaves(definitions: dict, prefix: str = "") -> dict[str, Flag]:
    """The flags of nested definitions by their full dotted name."""
    found = {}
    for name, value in definitions.items():
        found |= {prefix + name: value} if isinstance(value, Flag) else leaves(value, f"{prefix}{name}.")
    return found


def defaults(definitions: dict) -> ml_collections.ConfigDict:
    """The settings of a run that is given no flag."""
    return _read(definitions, lambda name, flag: flag.default)


def run(main, definitions: dict, argv: list[str] | None = None) -> None:
    """Defines the flags, parses `argv` (default: the command line), calls `main(config)` and exits.

    A `UserError` or `OSError` becomes one line on standard error and exit code 2; a misspelt or mistyped flag,
    which absl reports with the nearest names, exit code 1. `$NAME` and `${NAME}` in a text flag stand for environment
    variables, because job scripts quote them.
    """
    for name, flag in leaves(definitions).items():
        if flag.choices:
            flags.DEFINE_enum(name, flag.default, flag.choices, flag.help)
        else:
            _DEFINERS[flag.type or type(flag.default)](name, flag.default, flag.help)

    def checked_main(positional):
        try:
            if len(positional) > 1:
                raise UserError(f"unexpected argument {positional[1]!r}: every setting is a flag, --name=value")
            main(_read(definitions, lambda name, flag: expand_variables(name, flags.FLAGS[name].value)))
        except (UserError, OSError) as error:  # a missing file, a full disk, a lost network
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(checked_main, argv=argv)


def expand_variables(name: str, value):
    """Replaces `$NAME` in text by the environment's value.

    Raises:
      UserError: naming flag and variable, if it is not set.
    """

    def lookup(match):
        variable = match[1] or match[2]
        if variable not in os.environ:
            raise UserError(f"--{name}={value}: the environment variable {variable} is not set")
        return os.environ[variable]

    return _VARIABLE.sub(lookup, value) if isinstance(value, str) else value


def _read(definitions: dict, value_of, prefix: str = "") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    for name, value in definitions.items():
        if isinstance(value, Flag):
            config[name] = value_of(prefix + name, value)
        else:
            config[name] = _read(value, value_of, f"{prefix}{name}.")
    return config
