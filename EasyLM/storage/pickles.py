"""What readers of pickles share: they execute no code of a pickle, and no pickle exhausts the memory."""

import pickletools
from typing import Any, BinaryIO


class Unchangeable(type):
    """The type of a class whose attributes a pickle cannot set."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise TypeError(f"{cls.__name__} cannot be changed")


def check_memo(pickle: bytes | BinaryIO) -> None:
    """Reads a stream up to the end of a pickle. Refuses a memo with gaps: Python allocates it up to the largest index.

    Raises:
      ValueError: for a gap, or if the bytes are not a pickle.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > count:
            raise ValueError(f"{opcode.name} {argument} after {count} operations")
