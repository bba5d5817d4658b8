"""What the service gives: JSON, PNG, server-sent events, and refusals."""

import asyncio
import base64
import contextlib
import json
import logging
import threading
from concurrent.futures import CancelledError

import numpy as np

from EasyLM.errors import UserError
from evaluation.serving.batcher import ClosedError, QueueFullError
from evaluation.serving.engine import Answer
from evaluation.serving.uploads import Refused
from tokenizer.media import grids, images

UNFINISHED = "the service stops, and this request was not done in time"
_HEARTBEAT_SECONDS = 10.0  # of a stream in which nothing else happens


def refusal_of(error: Exception) -> Refused:
    """What an error means to a client."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UserError):
        return Refused(422, "invalid", str(error))
    if isinstance(error, QueueFullError):
        return Refused(429, "queue_full", str(error), error.retry_after)
    if isinstance(error, ClosedError):
        return Refused(503, "stopping", str(error), 10)
    return Refused(500, "internal", "this request failed inside the service; its log says why")


def answer_body(answer: Answer) -> dict:
    """A `GenerateResponse`."""
    return {"pictures": _encoded(answer.pictures), "tokens": answer.tokens.tolist(), "batch": answer.batch}


def _encoded(pictures_CF: np.ndarray) -> list[list[str]]:
    return [[base64.b64encode(images.png_bytes(images.to_uint8(one))).decode() for one in row] for row in pictures_CF]


def sheet(pictures_CF: np.ndarray) -> bytes:
    """One PNG file: a row for each candidate, a column for each new picture."""
    candidates, frames, *shape = pictures_CF.shape
    return images.png_bytes(grids.grid(images.to_uint8(pictures_CF.reshape(candidates * frames, *shape)), frames))


class News:
    """The newest partial pictures, from the engine's thread to a stream: what a slow reader misses is not kept."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._changed = loop, asyncio.Event()
        self._lock, self._newest = threading.Lock(), None

    def tell(self, newest) -> None:
        """In any thread. None: something else has happened."""
        with self._lock:
            self._newest = newest or self._newest
        with contextlib.suppress(RuntimeError):  # the loop has ended: so has the stream
            self._loop.call_soon_threadsafe(self._changed.set)

    async def wait(self):
        """The newest since the last time, or None after a while."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), _HEARTBEAT_SECONDS)
        self._changed.clear()
        with self._lock:
            newest, self._newest = self._newest, None
        return newest


async def events(future, news: News):
    """Server-sent events of a request until its future is done."""
    from anyio import to_thread

    try:
        while not future.done():
            newest = await news.wait()
            if newest is not None and not future.done():
                pictures = await to_thread.run_sync(_encoded, newest.pictures)
                yield _event("partial", {"done": newest.done, "total": newest.total, "pictures": pictures})
            elif not future.done():
                yield ": waiting\n\n"
        try:
            yield _event("answer", await to_thread.run_sync(answer_body, future.result()))
        except CancelledError:
            yield _event("error", refusal_of(ClosedError(UNFINISHED)).body)
        except Exception as error:  # the status is sent already
            refused = refusal_of(error)
            if refused.status == 500:  # nobody above here sees it
                logging.exception("a stream failed")
            yield _event("error", refused.body)
    finally:
        future.cancel()  # where the client has left


def _event(name: str, body: dict) -> str:
    return f"event: {name}\ndata: {json.dumps(body)}\n\n"
