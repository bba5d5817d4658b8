"""Bounds the work of a request, and the work that each client has outstanding until its response is sent."""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator

from EasyLM.errors import UserError
from evaluation.prompting import GenerationSettings


def check_prompt_length(num_images: int, most: int) -> None:
    """Raises UserError if a prompt has more images than the model's longest prompt, `most`."""
    if num_images > most:
        raise UserError(f"{num_images} images: a prompt has at most {most} for this model")


def check_num_new_images(settings: GenerationSettings, most: int) -> None:
    """Raises UserError if a request asks for more than `most` images, of all candidates together."""
    if settings.num_candidates * settings.num_new_images > most:
        raise UserError(
            f"n_candidates={settings.num_candidates}, n_new_frames={settings.num_new_images}: at most {most} new "
            "images per request"
        )


class TooMuchWorkError(Exception):
    """A client has too much work outstanding."""


class Workload:
    """The costs of the outstanding requests of each client. Thread-safe."""

    def __init__(self, most: int):
        """`most`: largest outstanding cost of a client."""
        self._most, self._lock = most, threading.Lock()
        self._costs: dict[str, list[int]] = defaultdict(list)

    @contextlib.contextmanager
    def admitted(self, client: str, cost: int) -> Iterator[None]:
        """Counts a request of a client until the context ends. The response is sent inside the context.

        Each other request counts at most as much as this one: a client with expensive requests, or others with the
        same address, can still send cheap ones. A client without requests is always admitted.

        Raises:
          TooMuchWorkError: if the client has too much work outstanding.
        """
        with self._lock:
            others = self._costs.get(client, [])
            outstanding = sum(min(other, cost) for other in others)
            if others and outstanding + cost > self._most:
                raise TooMuchWorkError(
                    f"{len(others)} requests of this client are open: with this one, their answers have more than "
                    f"{self._most} images; read these answers first"
                )
            self._costs[client].append(cost)
        try:
            yield
        finally:
            with self._lock:
                self._costs[client].remove(cost)
                if not self._costs[client]:
                    del self._costs[client]
