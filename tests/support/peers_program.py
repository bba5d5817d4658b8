"""A program of several processes that compute together until one of them fails. Used by test_peers.py."""

import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from EasyLM import flags
from EasyLM.errors import UserError
from EasyLM.flags import Flag
from EasyLM.parallel import JAX_DISTRIBUTED_FLAGS, fail_together, initialize_distributed
from EasyLM.training.watchdog import Watchdog

FLAGS = {
    "failing": Flag(-1, "The process that fails; -1: none, and all finish."),
    "how": Flag("UserError", "How it fails."),
    "jax_distributed": JAX_DISTRIBUTED_FLAGS,
}


@fail_together()
def main(config):
    initialize_distributed(config.jax_distributed)
    process = jax.process_index()
    print("connected", flush=True)
    deadline = time.monotonic() + (120 if config.failing >= 0 else 2)
    with Watchdog(0.05 if config.how == "hang" else 30) as watchdog:
        for step in range(10**6):
            if process == config.failing and step > 10:
                fail_as(config.how)
            watchdog.expect(f"step {step}")
            if multihost_utils.process_allgather(np.array(time.monotonic() > deadline)).any():
                return


def fail_as(how):
    if how == "UserError":
        raise UserError("a.jsonl:3: not JSON")
    if how == "KeyError":
        raise KeyError("x")
    if how == "slow exit":  # as a service that does not close
        threading.Thread(target=time.sleep, args=(60,)).start()
        raise UserError("a.jsonl:3: not JSON")
    time.sleep(120)


if __name__ == "__main__":
    flags.run(main, FLAGS)
