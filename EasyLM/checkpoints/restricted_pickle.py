"""Reads settings from pickles of the LVM release. The code that a pickle refers to is never executed."""

import io
import pickle
from typing import Any

from EasyLM.errors import UserError


class _Settings:
    """Replaces ConfigDict and FieldReference of ml_collections. It holds their attributes and has no methods."""


_ALLOWED = {
    ("ml_collections.config_dict.config_dict", "ConfigDict"): _Settings,
    ("ml_collections.config_dict.config_dict", "FieldReference"): _Settings,
    **{("builtins", kind.__name__): kind for kind in (bool, float, int, str)},  # a FieldReference stores its field type
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return _ALLOWED[module, name]


class _RefusedError(Exception):
    pass


def loads(data: bytes, path: str) -> Any:
    """Returns the content of a pickle as plain dicts, lists, tuples and values.

    A ConfigDict becomes a dict. A FieldReference becomes its value.

    Raises:
      UserError: if the pickle is broken or refers to anything other than ConfigDict, FieldReference and plain types.
        The message names `path`.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(data)).load())
    except _RefusedError as error:
        raise UserError(f"{path}: refused: the pickle refers to {error}; only settings are read from pickles") from None
    except Exception as error:  # a broken pickle may raise almost any exception
        raise UserError(f"{path}: not a readable pickle ({type(error).__name__}: {error})") from None


def _plain(value: Any) -> Any:
    if isinstance(value, _Settings):
        attributes = vars(value)
        return _plain(attributes["_fields"] if "_fields" in attributes else attributes["_value"])
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value
