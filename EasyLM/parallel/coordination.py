"""Coordination of processes through JAX's key-value service, for host work of any duration.

Device collectives are no substitute: on CPUs (gloo) they time out after 30 s.
"""

import contextlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from EasyLM.errors import UserError, error_line

_Result = TypeVar("_Result")
_POLL_MS = 5000  # Ctrl-C is handled between two polls
_REPORT_SECONDS = 60  # between two messages of a process that waits
_DONE = "done"  # the value of a process that has finished; any other value is its error message
_calls = itertools.count()  # all processes make the same calls in the same order, so each call has its own keys


def on_first_process_first(function: Callable[[], _Result]) -> _Result:
    """Calls `function` on process 0, then on the other processes, and returns its result.

    Use it for work that leaves a file on a shared disk, such as an index: only process 0 does the work, the others
    read its file. Returns when all processes have finished, without a time limit.

    Raises:
      UserError: on the other processes, if `function` raised on one. That process raises the original exception.
    """
    process_count, own_index = jax.process_count(), jax.process_index()
    if process_count == 1:
        return function()
    client, call = jax_client(), next(_calls)
    keys = [f"EasyLM/on_first_process_first/{call}/{process}" for process in range(process_count)]
    if own_index != 0:
        _wait(client, keys[0], process=0)
    try:
        result = function()
    except BaseException as error:
        client.key_value_set(keys[own_index], _error_message(own_index, error))
        raise
    client.key_value_set(keys[own_index], _DONE)
    for process in range(process_count):
        _wait(client, keys[process], process)
    return result


def from_all_processes(value: Any) -> list[Any]:
    """Returns the JSON value that each process gives, in the order of processes. All processes must call it."""
    if jax.process_count() == 1:
        return [value]
    client, call = jax_client(), next(_calls)
    keys = [f"EasyLM/from_all_processes/{call}/{process}" for process in range(jax.process_count())]
    client.key_value_set(keys[jax.process_index()], json.dumps(value))
    return [json.loads(_value(client, key, process)) for process, key in enumerate(keys)]


def check_same(values: Mapping[str, Any]) -> None:
    """Checks that `values`, JSON values by name, are equal on all processes.

    Raises:
      UserError: on every process, with the first value that differs.
    """
    if jax.process_count() == 1:
        return
    client, key = jax_client(), f"EasyLM/check_same/{next(_calls)}"

    def compare():
        if jax.process_index() == 0:
            client.key_value_set(key, json.dumps(values))
            return
        expected = json.loads(client.blocking_key_value_get(key, _POLL_MS))  # process 0 has already set it
        for name, value in values.items():
            if value != expected[name]:
                raise UserError(
                    f"the processes start from different states: {name} is {value} on process {jax.process_index()} "
                    f"and {expected[name]} on process 0; all processes need the same run directory (on a shared disk) "
                    "and the same data"
                )

    on_first_process_first(compare)


class PeerError(UserError):
    """Another process has failed. The message names it."""


class Channel:
    """Ordered messages from each process to all others, for host work in background threads.

    A process receives the messages of another one in the order in which they were sent. It waits for them without a
    time limit. In a run of one process, messages are dropped.

    Args:
      name: unique within the run. All processes create the channel.
    """

    def __init__(self, name: str):
        self._client = jax_client() if jax.process_count() > 1 else None
        self._directory = f"EasyLM/channel/{name}"
        self._sent = itertools.count()
        self._received: dict[int, Iterator[int]] = {}

    def send(self, value: Any) -> None:
        """Sends a JSON value."""
        self._put({"value": value})

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """If the body raises, the other processes raise a PeerError in place of the next message of this process."""
        try:
            yield
        except BaseException as error:
            process = jax.process_index()
            known = isinstance(error, PeerError)  # names the process
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service ends with process 0
                self._put({"error": f"{error}" if known else f"process {process}: {error_line(error)}"})
            raise

    def receive(self, process: int) -> Any:
        """Returns the next message of a process.

        Raises:
          PeerError: if it has failed.
          UserError: if it is not reachable.
        """
        number = next(self._received.setdefault(process, itertools.count()))
        message = json.loads(_value(self._client, f"{self._directory}/{process}/{number}", process))
        if "error" in message:
            raise PeerError(message["error"])
        return message["value"]

    def delete(self) -> None:
        """Deletes all messages. Every process must have received those that it needs."""
        if self._client is not None:
            self._client.key_value_delete(f"{self._directory}/")

    def _put(self, message: dict[str, Any]) -> None:
        key = f"{self._directory}/{jax.process_index()}/{next(self._sent)}"
        if self._client is not None:
            self._client.key_value_set(key, json.dumps(message, separators=(",", ":")))


def jax_client() -> Any:
    """Returns the client of JAX's key-value service, through Orbax: JAX has no public name for it."""
    from orbax.checkpoint import multihost  # takes a second; only runs of several processes need it

    return multihost.get_jax_distributed_client()


def _error_message(process: int, error: BaseException) -> str:
    """Returns the message that the other processes print."""
    if isinstance(error, (UserError, OSError)):
        return error_line(error)
    return f"process {process} stopped: {error_line(error)}"


def _wait(client: Any, key: str, process: int) -> None:
    """Waits until `process` is done.

    Raises:
      UserError: if it failed or is no longer reachable.
    """
    value = _value(client, key, process)
    if value != _DONE:
        raise UserError(value)


def _value(client: Any, key: str, process: int) -> str:
    """Waits until `process` has set its key, and returns the value. Logs a message every minute.

    Raises:
      UserError: if the process is no longer reachable.
    """
    value, begin = None, time.monotonic()
    reported = begin
    while value is None:
        if time.monotonic() > reported + _REPORT_SECONDS:
            reported = time.monotonic()
            logging.warning("waiting for process %d since %.0f s", process, reported - begin)
        try:
            value = client.blocking_key_value_get(key, _POLL_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise UserError(f"process {process} is not reachable: {str(error).splitlines()[0]}") from None
    return value
