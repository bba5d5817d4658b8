"""Command-line settings: nested dicts of `Flag`, parsed by absl into one `ConfigDict`.

Each leaf is the flag `--group.name=value`. A flag declares its type, choices and range; `run` checks them before it
calls `main(config)`. Nothing below `main` reads a flag.
"""

import builtins
import dataclasses
import functools
import logging
import math
import operator
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

from absl import app, flags
from ml_collections import ConfigDict

import EasyLM
from EasyLM.errors import USER_ERROR, UserError, check_own_package, choose, nearest_names, one_line
from EasyLM.interrupt import exit_interrupted, raises_interrupts
from EasyLM.progress import print_if_possible
from EasyLM.protocols import check_flag

Settings = TypeVar("Settings")  # a frozen dataclass
DTYPE_ALIASES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # the release accepts both
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")
_HOME = re.compile(r"(?:^|(?<=,)|(?<=::))~[\w.-]*(?=/)")  # at the start of a path: in a comma list, after PREFIX::
_HELP = {dashes + name for dashes in ("-", "--") for name in ("h", "help", "helpshort", "helpfull")}
_WIDTH = 110  # columns of the help
_DEFINERS: dict[type, Callable] = {
    bool: flags.DEFINE_boolean,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}
_TYPES_IN_WORDS = {bool: "True or False", int: "an integer", float: "a number"}
_TYPE_NAMES = {bool: "True|False", int: "INTEGER", float: "NUMBER", str: "TEXT"}

Definitions = Mapping[str, Any]  # each value is a Flag or further Definitions, a group


class Required(NamedTuple):
    """When a flag must be given, if other flags decide: in words, such as "unless --a is given", and as code."""

    words: str
    holds: Callable[[ConfigDict], bool]


@dataclasses.dataclass(frozen=True)
class Flag:
    """A setting. The limits apply to numbers. NaN is never valid, nor is an integer that does not fit in 64 bits."""

    default: Any  # None: unset
    help: str
    _: dataclasses.KW_ONLY
    choices: tuple[str, ...] | None = None  # the valid texts
    least: float | None = None  # the smallest valid number
    above: float | None = None  # an exclusive lower limit
    most: float | None = None  # the largest valid number
    below: float | None = None  # an exclusive upper limit
    required: bool | Required = False  # must be given and not empty
    type: builtins.type | None = None  # type of the value; required if the default is None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)  # further texts -> the choice they mean
    may_be_remote: bool = False  # of an output: it can be on an object store
    reads_local_disk: bool = False  # of an input: the command refuses one on an object store
    free_text: bool = False  # no path: what looks like a protocol means nothing
    ignored: bool = False  # a flag of the LVM release that has no effect; it is parsed and left out of the settings

    @property
    def value_type(self) -> builtins.type:
        """The type of the values."""
        return self.type or type(self.default)

    @property
    def range(self) -> str:
        """The valid numbers in words, such as "at least 0 and below 1"; empty if all are valid."""
        if self.least is not None and self.most is not None:
            return f"{self.least}..{self.most}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)

    def allows(self, value: Any) -> bool:
        """Whether a value is in the range. None is always valid, NaN never."""
        if value is None or self.value_type not in (int, float):
            return True
        return (
            not (isinstance(value, float) and math.isnan(value))
            and (self.value_type is float or -(2**63) <= value < 2**63)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )


def leaves(definitions: Definitions, prefix: str = "") -> dict[str, Flag]:
    """Flattens nested definitions to flags by their full dotted name. Ignored flags are included."""
    flat: dict[str, Flag] = {}
    for name, value in definitions.items():
        flat |= {prefix + name: value} if isinstance(value, Flag) else leaves(value, f"{prefix}{name}.")
    return flat


def defaults(definitions: Definitions) -> ConfigDict:
    """Returns the default settings."""
    return _read(definitions, lambda name, flag: flag.default)


def validate(definitions: Definitions, config: ConfigDict) -> None:
    """Checks required flags, choices, ranges, and the protocols of paths.

    Raises:
      UserError: naming all missing flags, or the first flag whose value is not valid.
    """
    flat = {name: flag for name, flag in leaves(definitions).items() if not flag.ignored}
    values = {name: functools.reduce(operator.getitem, name.split("."), config) for name in flat}
    empty = [(f"--{name}", flag.required) for name, flag in flat.items() if values[name] in ("", None)]
    missing = [name for name, when in empty if when is True]
    conditional = [(name, when) for name, when in empty if isinstance(when, Required) and when.holds(config)]
    missing += [f"{name} (required {when.words})" for name, when in conditional]
    if missing:
        raise UserError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    for name, flag in flat.items():
        if flag.choices and values[name] is not None:
            choose(f"--{name}", values[name], flag.choices)
        if not flag.allows(values[name]):
            kind = "a number" if flag.value_type is float else "a 64-bit integer"
            in_64_bits = flag.value_type is float or -(2**63) <= values[name] < 2**63
            raise UserError(f"--{name}={values[name]}: must be {flag.range if flag.range and in_64_bits else kind}")
        if flag.value_type is str and not flag.free_text:
            may_be_remote = flag.may_be_remote or not name.startswith("output")
            check_flag(f"--{name}", values[name] or "", may_be_remote, flag.reads_local_disk)


def run(main: Callable[[ConfigDict], Any], definitions: Definitions, argv: list[str] | None = None) -> None:
    """Parses the command line, calls `main(config)` and exits.

    `--help` and `--version` print and exit with code 0. A wrong flag, a `UserError` or an `OSError` prints one line and
    exits with code 2, Ctrl-C with code 130. Otherwise the exit code is what `main` returns. Text flags may contain
    environment variables (see `expand_variables`).

    Args:
      main: the command. The help starts with the docstring of its module.
      definitions: the command's flags.
      argv: the command line with the program's name; None means `sys.argv`.
    """
    argv = sys.argv if argv is None else argv
    options = argv[1 : argv.index("--")] if "--" in argv else argv[1:]
    if not _HELP.isdisjoint(options):
        print_if_possible(help_text(main, definitions))
        sys.exit(0)
    if "--version" in options:
        print_if_possible(f"EasyLM-LVM {EasyLM.__version__}")
        sys.exit(0)
    try:
        config = parse(definitions, argv)
    except (flags.Error, UserError) as error:
        print(f"error: {one_line(str(error)).removeprefix('ERROR:: ')}", file=sys.stderr)
        sys.exit(USER_ERROR)

    def checked_main(_: list[str]) -> Any:
        try:
            if _program(main).startswith("python -m tokenizer."):
                check_own_package("tokenizer")
            return main(config)
        except (UserError, OSError) as error:  # OSError: a missing file, a full disk, a lost network
            print(f"error: {one_line(str(error))}", file=sys.stderr)
            sys.exit(USER_ERROR)
        except KeyboardInterrupt:
            exit_interrupted()

    for name in ("jax._src.xla_bridge", "httpx", "httpx2"):  # they log each device that is missing, each request
        logging.getLogger(name).setLevel(logging.WARNING)
    flags.FLAGS.mark_as_parsed()
    with raises_interrupts():
        app.run(checked_main, argv=argv[:1], flags_parser=lambda program: program)


def parse(definitions: Definitions, argv: list[str]) -> ConfigDict:
    """Parses and validates a command line, whose first item is the program's name. Also accepts absl's own flags.

    Raises:
      flags.Error: if a flag does not exist, or its value has another type.
      UserError: see `validate`, `expand_variables`.
    """
    registry = flags.FlagValues()
    registry.append_flag_values(flags.FLAGS)
    for name, flag in leaves(definitions).items():
        if flag.choices:
            flags.DEFINE_enum(name, flag.default, [*flag.choices, *flag.aliases], flag.help, flag_values=registry)
        else:
            _DEFINERS[flag.value_type](name, flag.default, flag.help, flag_values=registry)
    try:
        positional = registry(argv)
    except flags.UnrecognizedFlagError as error:
        similar = " or ".join(f"--{name}" for name in nearest_names(error.flagname, list(leaves(definitions))))
        hint = f"did you mean {similar}? " if similar else ""
        raise flags.Error(f"--{error.flagname}: no such flag; {hint}--help lists all") from None
    except flags.IllegalFlagValueError as error:
        match = re.match(r"flag (--([\w.]+)=.*?): ", str(error), re.DOTALL)
        given = leaves(definitions).get(match[2]) if match else None
        if not match or not given or given.choices:  # the message lists the choices; it can be about a flag of absl
            raise
        raise flags.Error(f"{match[1]}: must be {_TYPES_IN_WORDS[given.value_type]}") from None
    if len(positional) > 1:
        raise UserError(f"unexpected argument {positional[1]!r}: every setting is a flag, --name=value")
    for name, flag in leaves(definitions).items():
        if flag.ignored and registry[name].present:
            print(f"note: --{name}: {flag.help}", file=sys.stderr)

    def value_of(name: str, flag: Flag) -> Any:
        value = expand_variables(name, registry[name].value)
        if value not in flag.aliases:
            return value
        print(f"note: --{name}={value} means {flag.aliases[value]}", file=sys.stderr)
        return flag.aliases[value]

    config = _read(definitions, value_of)
    validate(definitions, config)
    return config


def help_text(main: Callable[[ConfigDict], Any], definitions: Definitions) -> str:
    """Returns the help of a command: usage, description, and its flags by group, the required ones first."""
    description = (sys.modules[main.__module__].__doc__ or "").strip().partition("\n\n")[0]
    parts = [f"usage: {_program(main)} --flag=value ...", description, *_groups(definitions, "")]
    parts.append("--flagfile=FILE reads flags from FILE, one per line; lines that start with # are comments.")
    return "\n\n".join(parts)


def expand_variables(name: str, value: Any) -> Any:
    """Replaces `$NAME` and `${NAME}` in a text value by environment variables, `~/` and `~user/` by home directories.

    Shells do not expand `~` after `--flag=`. The path of an existing file or folder stays as it is.

    Raises:
      UserError: naming flag and variable, if the variable is not set.
    """

    def lookup(match: re.Match) -> str:
        variable = match[1] or match[2]
        if variable not in os.environ:
            raise UserError(f"--{name}={value}: the environment variable {variable} is not set")
        return os.environ[variable]

    if not isinstance(value, str) or os.path.lexists(value):
        return value
    return _HOME.sub(lambda match: os.path.expanduser(match[0]), _VARIABLE.sub(lookup, value))


def _program(main: Callable) -> str:
    """Returns how the user starts this command, for the usage line."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if main.__module__ != "__main__":
        return f"python -m {main.__module__.removesuffix('.__main__')}"
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {sys.argv[0]}"


def _groups(definitions: Definitions, prefix: str) -> list[str]:
    """Returns the help of each group: a title and its flags."""
    own = {prefix + name: value for name, value in definitions.items() if isinstance(value, Flag)}
    lines = [f"{prefix.removesuffix('.')} flags:".lstrip()] if own else []
    for name, flag in sorted(own.items(), key=lambda item: not item[1].required):
        heading = f"  --{name}={_TYPE_NAMES[flag.value_type]}  ({'; '.join(_rules(flag))})"
        lines.append(textwrap.fill(heading, _WIDTH, subsequent_indent="        ", break_on_hyphens=False))
        lines.append(textwrap.indent(textwrap.fill(flag.help, _WIDTH - 6), " " * 6))
    nested = {name: value for name, value in definitions.items() if not isinstance(value, Flag)}
    texts = [text for name, value in nested.items() for text in _groups(value, f"{prefix}{name}.")]
    return ["\n".join(lines), *texts] if own else texts


def _rules(flag: Flag) -> list[str]:
    """Returns the rules of a flag's value in words: required or the default, then choices and range."""
    default = {"": "empty", " ": "' '", None: "none"}.get(flag.default, flag.default)
    required = "required" + (f" {flag.required.words}" if isinstance(flag.required, Required) else "")
    rules = [required if flag.required else f"default: {default}"]
    if flag.choices:
        rules.append(f"one of: {', '.join(name or 'empty' for name in flag.choices if name not in flag.aliases)}")
    rules += [f"{alias} means {choice}" for alias, choice in flag.aliases.items()]
    return rules + [flag.range] * bool(flag.range)


def _read(definitions: Definitions, value_of: Callable[[str, Flag], Any], prefix: str = "") -> ConfigDict:
    config = ConfigDict()
    for name, value in definitions.items():
        if not isinstance(value, Flag):
            config[name] = _read(value, value_of, f"{prefix}{name}.")
        elif not value.ignored:
            config[name] = value_of(prefix + name, value)
    return config


def to_dataclass(kind: type[Settings], config: Mapping[str, Any]) -> Settings:
    """Returns a dataclass of the config's values of the same names. Functions below `main` take such dataclasses."""
    return kind(**{field.name: config[field.name] for field in dataclasses.fields(cast(Any, kind))})
