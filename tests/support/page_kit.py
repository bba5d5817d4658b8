"""Helpers of the page's tests: the page in a process of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

SECONDS = 240  # timeout, much longer than any step takes


def wait_until(condition: Callable[[], Any], description: str, ignored: type[Exception]) -> Any:
    """Waits for a condition that another process makes true, and returns its value. Ignores errors of one type."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(ignored):
            if value := condition():
                return value
        time.sleep(0.05)
    raise AssertionError(f"timed out: {description}")


@contextlib.contextmanager
def running_page(
    port: int, *flags: str, stop: signal.Signals, preparation: str = "", **environment: str
) -> Iterator[Callable[[], str]]:
    """Runs `python -m evaluation.demo` while the context is open, then sends `stop`. Asserts that it ends cleanly.

    `preparation` is Python code that its process runs before.

    Yields a function that waits until the page answers, and returns its URL: meanwhile, a test can do something else.
    """
    # As a background command of a shell: it starts with SIGINT ignored.
    background = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]
    program = f"{preparation}\nimport runpy; runpy.run_module('evaluation.demo', run_name='__main__', alter_sys=True)"
    command = [*background, sys.executable, "-c", program, f"--port={port}", *flags]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    server = subprocess.Popen(command, env=os.environ | environment, **options)
    url = f"http://127.0.0.1:{port}"

    def listens() -> socket.socket:
        assert server.poll() is None, "the page has ended"
        return socket.create_connection(("127.0.0.1", port))

    def when_ready() -> str:
        wait_until(listens, "the page", ConnectionError).close()
        httpx.get(f"{url}/config", timeout=SECONDS).raise_for_status()
        return url

    try:
        yield when_ready
    finally:
        server.send_signal(stop)
        try:
            output, _ = server.communicate(timeout=SECONDS)
        finally:
            server.kill()
        print(output)  # pytest shows it if the test fails
    assert server.returncode == 0 and "Traceback" not in output, output
