"""`UserError`, for problems that the user can fix, and checks that raise it."""

import contextlib
import difflib
import importlib.util
import os
from collections.abc import Collection, Iterator

USER_ERROR = 2  # the exit code after an error that the user can correct
MOST_CHARACTERS = 2000  # of a message

OWN_MARK = "(EasyLM-LVM)"  # in the docstring of a package that `check_own_package` checks


class UserError(ValueError):
    """Bad input: a flag, a file, a line, a checkpoint. The message names it, its value and the valid choices.

    Commands print the message as one line and exit with the code USER_ERROR (`flags.run`). Any other exception is a
    bug, and keeps its traceback. Control characters, which file names can contain, are escaped, so that the message is
    one line.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class UnavailableError(UserError):
    """A store, a package or disk space that a command needs is unavailable. No input is at fault.

    Commands that skip unusable inputs must not skip an input because of this error: they end, to be run again.
    """


def one_line(text: str) -> str:
    """Returns a message as one readable line.

    Escapes the characters that do not print: a line break becomes `\\n`, a byte that is not UTF-8 `\\udce9`. Leaves out
    the middle of a text that is longer than MOST_CHARACTERS: a damaged file can contain a value of any length.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"


def error_line(error: BaseException) -> str:
    """Returns one line that describes any error. That of an operating system error names the file."""
    if isinstance(error, OSError):
        return one_line(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    text = f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return one_line(text.partition("\n")[0])


def first_line(error: BaseException) -> str:
    """Returns the type and the first line of an error, for errors of packages whose type says what happened."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def choose(name: str, value: str, choices: Collection[str]) -> str:
    """Returns `value` if it is one of `choices`.

    Raises:
      UserError: if it is not. The message has `name`, the value and the choices.
    """
    if value not in choices:
        raise UserError(f"{name}={value!r}: choose one of {', '.join(repr(c) for c in choices)}")
    return value


def nearest_names(name: str, names: list[str]) -> list[str]:
    """Returns suggestions for a misspelt flag: similar names, or if there are none, names with the same last part."""
    return difflib.get_close_matches(name, names, n=3, cutoff=0.75) or [
        full_name for full_name in names if full_name.rpartition(".")[2] == name.rpartition(".")[2]
    ]


@contextlib.contextmanager
def prefix_errors(subject: str, separator: str = ": ") -> Iterator[None]:
    """Puts a subject, such as `--flag=value`, before the message of a UserError raised inside. Keeps its class."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{subject}{separator}{error}") from error


def check_installed(feature: str, extra: str, *packages: str) -> None:
    """Checks that optional packages are installed, without importing them, which takes seconds.

    Raises:
      UnavailableError: naming the feature, the missing package, and the extra that installs it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(f"{feature} needs the package {package}: pip install -e '.[{extra}]'")


def check_own_package(name: str) -> None:
    """Checks that no other project's package hides or has overwritten a package of this project, without importing it.

    PyPI has an unrelated package `tokenizer`.

    Raises:
      UserError: naming the file that Python would import, and the remedy.
    """
    own = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), name, "__init__.py")
    spec = importlib.util.find_spec(name)
    path = (spec and spec.origin) or own
    is_hidden = os.path.realpath(path) != os.path.realpath(own)
    if not is_hidden and os.path.isfile(own):
        with open(own, encoding="utf-8", errors="replace") as file:
            is_hidden = OWN_MARK not in file.read(2000)
    if is_hidden:
        raise UserError(
            f"{path}: the package {name} of another project hides that of this project: pip uninstall {name}, "
            "then install this project again"
        )
