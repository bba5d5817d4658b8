"""The time that a scheduler grants a run between a stop signal and the end of its process."""

import logging
from typing import Any

from EasyLM.checkpoints import Checkpointer
from EasyLM.parallel import from_all_processes
from EasyLM.training.stop_signal import seconds_since_signal


class PreemptionNotice:
    """Decides after a stop signal whether there is time to save before the process is killed.

    Args:
      seconds: from the signal to the end of the process; 0: unknown, so every save is tried.
    """

    def __init__(self, seconds: float, checkpointer: Checkpointer):
        self._seconds, self._checkpointer = seconds, checkpointer

    def leaves_time_to_save(self, state: Any) -> bool:
        """Returns whether to save a state now, the same on all processes. Every process must call it.

        Returns True before a signal, and if the time is unknown. Otherwise a message logs why the state is not saved.
        """
        if not self._seconds:
            return True
        since, needed = seconds_since_signal(), self._checkpointer.seconds_to_save(state)
        fits = since is None or since + needed <= self._seconds
        if not fits:
            logging.warning(
                "no checkpoint of this step: a save takes about %.0f s, and %.0f of the %.0f s of "
                "--preemption_notice_seconds are left; the newest checkpoint remains",
                needed,
                max(0.0, self._seconds - (since or 0.0)),
                self._seconds,
            )
        return all(from_all_processes(fits))
