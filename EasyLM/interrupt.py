"""Ctrl-C ends a command with one line and the exit code INTERRUPTED, also while XLA compiles."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # the exit code after Ctrl-C, by the convention of shells
_RETRY_SECONDS = 0.01


@contextmanager
def raises_interrupts() -> Iterator[None]:
    """Handles SIGINT by `raise_interrupt`, if Python would handle it by its own `default_int_handler`."""
    is_handled = threading.current_thread() is threading.main_thread()
    if not is_handled or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, raise_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def raise_interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, but later if this is a callback of the garbage collector, which drops exceptions.

    JAX has such a callback, and it is often the first Python code that runs at the end of a compilation.
    """
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in callbacks:
            timer = threading.Timer(_RETRY_SECONDS, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def exit_interrupted() -> NoReturn:
    """Ends the process with one line. Call it when the context managers of the command have ended.

    The interpreter is not finalized: that crashes while XLA still compiles in a thread of its own.
    """
    print("\ninterrupted", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(INTERRUPTED)
