"""The processes of a run end together.

Without this, the other processes wait for a failed one in their next collective operation: on GPUs forever, on CPUs
until a native error that does not name the cause. Each process has a TCP connection with process 0, which the kernel
closes when a process ends in any way. Before it exits, a process sends a message with its result. If it fails, or its
connection closes without a message, all others print one line that names it, and exit. If process 0 is killed, JAX
aborts the others, sometimes before they print the line.
"""

import atexit
import contextlib
import faulthandler
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, ClassVar, NoReturn

import jax

from EasyLM.errors import USER_ERROR, UserError, error_line
from EasyLM.interrupt import INTERRUPTED
from EasyLM.parallel.coordination import jax_client

EXIT_SECONDS = 10  # given to a process to exit after an error
_CAUSE_SECONDS = 2  # an error may result from the end of another process, which is known within this time
_CONNECT_SECONDS = 60
_KEEPALIVE_SECONDS = 10
_KEY = "EasyLM/peers"
_LONGEST_MESSAGE = 1 << 16  # bytes of a line


class Peers:
    """The connections of this process: process 0 has one with each other process, the others have one with process 0.

    Attributes:
      connected: the connections of this process; None before `connect_peers`, and in runs of one process.
    """

    connected: ClassVar["Peers | None"] = None

    def __init__(self, process: int, connections: "Sequence[_Connection]"):
        self._process, self._connections = process, connections
        self._ending = threading.Lock()  # acquired once, by what ends this process
        self._exit_code: int | None = None
        for connection in connections:
            name = f"process {connection.process}"
            threading.Thread(target=self._read, args=(connection,), name=name, daemon=True).start()
        atexit.register(self._exit)  # runs before JAX's own function, which waits for the other processes

    def fail(self, error: str, code: int, stacks: bool = False) -> None:
        """Tells the other processes that this one fails. After this call it must print its error and exit.

        Does not return if another process has failed before: the error of this one is a consequence.

        Args:
          error: one line.
          code: the exit code of all processes.
          stacks: whether the others print the Python stacks of their threads.
        """
        if self._exit_code is not None:  # called before, by an inner `fail_together`
            return
        time.sleep(_CAUSE_SECONDS)
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread ends this process
        self._exit_code = code
        message = {"process": self._process, "host": socket.gethostname(), "error": error[: _LONGEST_MESSAGE // 8]}
        self._send({**message, "code": code, "stacks": stacks})
        self._wait_for_others()
        # The exit of this process may hang too, for example in a background save.
        last_resort = threading.Timer(EXIT_SECONDS, lambda: _exit_now(code, f"error: {error}"))
        last_resort.daemon = True
        last_resort.start()

    def _read(self, connection: "_Connection") -> None:
        """Reads the messages of a process until its connection closes."""
        message = connection.receive()
        if message is None:
            message = {
                "process": connection.process,
                "host": connection.host,
                "error": "ended without an error message; it was probably killed, for example for lack of memory",
                "code": 1,
            }
        if "error" in message and self._ending.acquire(blocking=False):
            line = f"error: process {message['process']} on {message['host']}: {message['error']}"
            _print_line(line)
            if message.get("stacks"):
                _print_stacks()
            self._send(message, besides=connection)
            self._wait_for_others()
            _exit_now(message["code"])

    def _send(self, message: dict[str, Any], besides: "_Connection | None" = None) -> None:
        for connection in self._connections:
            if connection is not besides:
                connection.send(message)

    def _wait_for_others(self) -> None:
        """On process 0, waits until the others have exited: JAX aborts a process whose process 0 has ended."""
        end = time.monotonic() + EXIT_SECONDS + 1
        for connection in self._connections if self._process == 0 else ():
            connection.closed.wait(max(0.0, end - time.monotonic()))

    def _exit(self) -> None:
        """At the exit of the process. After an error, leaves at once: JAX would wait for the others to finish."""
        if self._exit_code is not None:
            _exit_now(self._exit_code)
        self._send({"done": True})


class _Connection:
    """A connection with another process. Messages are JSON objects, one per line."""

    def __init__(self, sock: socket.socket, file: BinaryIO, process: int, host: str):
        self.process, self.host, self.closed = process, host, threading.Event()
        self._socket, self._file = sock, file

    def keep_alive(self, seconds: int) -> None:
        """Lets the kernel close the connection if the other host does not answer for about `seconds`."""
        interval = min(_KEEPALIVE_SECONDS, seconds)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, seconds // interval - 1))

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the other process has ended
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """Returns the last message of the other process, or None if it sends none. Sets `closed` if it has ended."""
        with contextlib.suppress(OSError, ValueError):
            if line := self._file.readline(_LONGEST_MESSAGE):
                threading.Thread(target=self._await_end, daemon=True).start()
                return json.loads(line)
        self.closed.set()
        return None

    def _await_end(self) -> None:
        with contextlib.suppress(OSError):
            self._file.read()
        self.closed.set()


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Ends all processes of the run if the body raises on one. Commands decorate `main` with it.

    The others print one line with the error and exit within seconds, with the exit code of this process. The exception
    is raised again.
    """
    try:
        yield
    except BaseException as error:
        code = _exit_code(error)
        if Peers.connected is not None and code:
            Peers.connected.fail(error_line(error), code)
        raise


def end_together(error: str, code: int) -> NoReturn:
    """Ends all processes of the run at once, from any thread. Each prints the error and the stacks of its threads."""
    _print_line(f"error: {error}")
    _print_stacks()
    if Peers.connected is not None:
        Peers.connected.fail(error, code, stacks=True)
    _exit_now(code)


def connect_peers(coordinator_address: str | None, heartbeat_seconds: int) -> None:
    """Connects the processes of a run after jax.distributed has started. A run of one process needs none.

    Args:
      coordinator_address: HOST:PORT of process 0, if it is known.
      heartbeat_seconds: after this time without a sign of life the connection to a host counts as lost.
    """
    if jax.process_count() == 1 or Peers.connected is not None:
        return
    process, client = jax.process_index(), jax_client()
    if process == 0:
        with _listener() as listener:
            hosts = [(coordinator_address or "").rpartition(":")[0].strip("[]"), socket.gethostname()]
            offer = {"hosts": hosts, "port": listener.getsockname()[1], "token": secrets.token_hex(16)}
            client.key_value_set(_KEY, json.dumps(offer))
            connections = _accept(listener, offer["token"], jax.process_count() - 1)
    else:
        offer = json.loads(client.blocking_key_value_get(_KEY, _CONNECT_SECONDS * 1000))
        connections = _connect(process, offer)
    if len(connections) < (jax.process_count() - 1 if process == 0 else 1):
        logging.warning(
            "not all processes could connect to process 0; the loss of a process is noticed after %d s",
            heartbeat_seconds,
        )
    for connection in connections:
        connection.keep_alive(heartbeat_seconds)
    Peers.connected = Peers(process, connections)


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _accept(listener: socket.socket, token: str, count: int) -> list[_Connection]:
    """Returns the connections of `count` processes, or of those that connect in time."""
    connections: dict[int, _Connection] = {}
    end = time.monotonic() + _CONNECT_SECONDS
    while len(connections) < count and time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a stranger
            listener.settimeout(max(0.1, end - time.monotonic()))
            sock, _ = listener.accept()
            with contextlib.ExitStack() as refused:
                refused.enter_context(sock).settimeout(5)
                file = refused.enter_context(sock.makefile("rb"))
                hello = json.loads(file.readline(_LONGEST_MESSAGE))
                if secrets.compare_digest(hello["token"], token):
                    sock.settimeout(None)
                    connections[hello["process"]] = _Connection(sock, file, hello["process"], hello["host"])
                    refused.pop_all()
    return list(connections.values())


def _connect(process: int, offer: dict[str, Any]) -> list[_Connection]:
    """Returns the connection with process 0; an empty list if none of its host names can be reached."""
    hello = {"token": offer["token"], "process": process, "host": socket.gethostname()}
    for host in filter(None, offer["hosts"]):
        with contextlib.suppress(OSError):
            sock = socket.create_connection((host, offer["port"]), timeout=10)
            sock.settimeout(None)
            connection = _Connection(sock, sock.makefile("rb"), 0, offer["hosts"][-1])
            connection.send(hello)
            return [connection]
    return []


def _exit_code(error: BaseException) -> int:
    """Returns the exit code of a command that raises `error` (see `flags.run`)."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return USER_ERROR if isinstance(error, (UserError, OSError)) else 1


def _print_line(text: str) -> None:
    """Prints a line in one write: `print` writes the newline apart, and a progress bar may come between."""
    sys.stderr.write(f"\n{text}\n")
    sys.stderr.flush()


def _print_stacks() -> None:
    """Prints the stacks of all threads to the standard error; `sys.stderr` of a notebook has no file descriptor."""
    faulthandler.dump_traceback(file=2)


def _exit_now(code: int, message: str = "") -> NoReturn:
    """Exits without JAX's wait for the other processes, which lasts `shutdown_timeout_seconds`."""
    if message:
        _print_line(message)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
