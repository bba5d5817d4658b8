"""The one exception that means: the user can mend this."""

import contextlib
import importlib.util
from collections.abc import Iterator


class UserError(ValueError):
    """Bad input: a flag, a file, a line, a checkpoint. Its message names the thing, its value and the valid choices.

    Entry points print it as one line and exit with code 2 (`flags.run`); any other exception is a fault of ours and
    keeps its traceback.
    """


@contextlib.contextmanager
def prefix_errors(subject: str) -> Iterator[None]:
    """Puts `subject: `, such as `--flag=value: `, before the message of a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{subject}: {error}") from error


def choose(name: str, value: str, choices) -> str:
    """Returns `value` if it is one of `choices`.

    Raises:
      UserError: naming the field, the value and the choices.
    """
    if value not in choices:
        raise UserError(f"{name}={value!r}: choose one of {', '.join(repr(c) for c in choices)}")
    return value


def check_installed(what: str, extra: str, *packages: str) -> None:
    """Looks for packages without importing them, which takes seconds, before other work that they are needed after.

    Raises:
      UserError: naming what needs them, the package that is missing, and the extra that brings it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{what} needs the package {package}: pip install -e '.[{extra}]'")
