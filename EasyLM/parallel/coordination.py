"""What the processes of a run tell each other over JAX's coordination service: work that may take any time on a host.

A collective of the devices is no place to wait for a slow process: on CPUs (gloo) one gives up after 30 s.
"""

import itertools
import json
from collections.abc import Callable, Mapping

import jax
from jax._src import distributed  # the service's client is public nowhere else

from EasyLM.errors import UserError

_POLL_MS = 5000  # between two looks for Ctrl-C
_DONE = "done"  # else what a process tells is its error
_calls = itertools.count()  # all processes make the same calls in the same order: a call has its own keys


def first_process_first(make: Callable):
    """`make()` on process 0, then on the others: what it leaves on a shared disk (an index) is made once.

    Returns when all processes have made theirs; waits as long as that takes, while they live.

    Raises:
      UserError: on every process, if `make` raised anything on one of them (which raises that).
    """
    processes, mine = jax.process_count(), jax.process_index()
    if processes == 1:
        return make()
    client, call = distributed.global_state.client, next(_calls)
    keys = [f"EasyLM/first_process_first/{call}/{process}" for process in range(processes)]
    if mine != 0:
        _wait(client, keys[0], process=0)
    try:
        made = make()
    except BaseException as error:
        client.key_value_set(keys[mine], _said(mine, error))
        raise
    client.key_value_set(keys[mine], _DONE)
    for process in range(processes):
        _wait(client, keys[process], process)
    return made


def check_same(facts: Mapping) -> None:
    """Returns if `facts`, JSON values by name, are the same on all processes.

    Raises:
      UserError: on every process, if not: naming the first fact that differs.
    """
    if jax.process_count() == 1:
        return
    client, key = distributed.global_state.client, f"EasyLM/check_same/{next(_calls)}"

    def compare():
        if jax.process_index() == 0:
            client.key_value_set(key, json.dumps(facts))
            return
        first = json.loads(client.blocking_key_value_get(key, _POLL_MS))  # is there: process 0 has had its turn
        for name, mine in facts.items():
            if mine != first[name]:
                raise UserError(
                    f"the processes do not begin alike: {name} is {mine} on process {jax.process_index()} and "
                    f"{first[name]} on process 0; all need the same run directory (--logger.output_dir on a shared "
                    "disk) and the same data"
                )

    first_process_first(compare)


def _said(process: int, error: BaseException) -> str:
    """One's own error as the others are to print it."""
    if isinstance(error, (UserError, OSError)):
        return f"{error}"
    return f"process {process} stopped: {type(error).__name__}: {error}".splitlines()[0]


def _wait(client, key: str, process: int) -> None:
    """Returns when a process has told that it is done."""
    told = None
    while told is None:
        try:
            told = client.blocking_key_value_get(key, _POLL_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise UserError(f"process {process} is gone: {str(error).splitlines()[0]}") from None
    if told != _DONE:
        raise UserError(told)
