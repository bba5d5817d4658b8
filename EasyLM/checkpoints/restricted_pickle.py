"""Reads settings from pickles of the LVM release. The code that a pickle refers to is never executed."""

import io
import pickle
from typing import Any

from EasyLM.errors import UserError
from EasyLM.storage import Unchangeable, check_memo

MOST_BYTES = 4 << 20  # a release's files have some kilobytes
MOST_VALUES = 10**5  # after the expansion of references to one object
_PLAIN_TYPES = (str, int, float, bool, bytes, type(None))


class _Settings(metaclass=Unchangeable):
    """Replaces ConfigDict and FieldReference of ml_collections. It holds their attributes and has no methods."""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("ml_collections.config_dict.config_dict", "ConfigDict"): _Settings,
    ("ml_collections.config_dict.config_dict", "FieldReference"): _Settings,
    # A FieldReference stores its field type. The name stands for it: a pickle could call the type, and `str` of nested
    # references needs gigabytes.
    **{("builtins", kind): kind for kind in ("bool", "float", "int", "str")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return _ALLOWED[module, name]


class _RefusedError(Exception):
    pass


def loads(data: bytes) -> Any:
    """Returns the content of a pickle as plain dicts, lists, tuples and values.

    A ConfigDict becomes a dict. A FieldReference becomes its value.

    Raises:
      UserError: if the pickle is broken, too large, or refers to anything other than ConfigDict, FieldReference and
        plain types.
    """
    if len(data) > MOST_BYTES:
        raise UserError(f"not a pickle of settings: it has more than {MOST_BYTES >> 20} MiB")
    try:
        check_memo(data)
        return _Expansion().plain(_Unpickler(io.BytesIO(data)).load())
    except _RefusedError as error:
        raise UserError(f"refused: the pickle refers to {error}; only settings are read from pickles") from None
    except Exception as error:  # a broken pickle may raise almost any exception
        raise UserError(f"not a readable pickle ({type(error).__name__}: {error})") from None


class _Expansion:
    """Replaces settings by plain values. Counts values, of which a few nested references make billions."""

    def __init__(self) -> None:
        self._count = 0

    def plain(self, value: Any) -> Any:
        self._count += 1
        if self._count > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values")
        if isinstance(value, _Settings):
            attributes = vars(value)
            return self.plain(attributes["_fields"] if "_fields" in attributes else attributes["_value"])
        if isinstance(value, dict):
            return {_require_plain(key): self.plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.plain(item) for item in value)
        return _require_plain(value)


def _require_plain(value: Any) -> Any:
    if type(value) not in _PLAIN_TYPES:
        raise ValueError(f"a {type(value).__name__} in place of a plain value")
    return value
