"""Responses of the HTTP service: JSON bodies, PNG sheets and server-sent events."""

import asyncio
import base64
import contextlib
import json
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError, Future

import numpy as np

from evaluation.serving.batch_worker import Answer
from evaluation.serving.batcher import ClosedError
from evaluation.serving.progress import Preview
from evaluation.serving.request_errors import to_request_error
from tokenizer.media import grids, images

UNFINISHED = "the service stops before this request is finished"
_HEARTBEAT_SECONDS = 10.0  # between comments in a stream without events


def answer_body(answer: Answer) -> dict:
    """Returns the JSON of a `GenerateResponse`."""
    return {"pictures": _png_base64(answer.images), "tokens": answer.tokens.tolist(), "batch": answer.batch}


def _png_base64(images_CFSS3: np.ndarray) -> list[list[str]]:
    pixels = images.to_uint8(images_CFSS3)
    return [[base64.b64encode(images.png_bytes(image)).decode() for image in row] for row in pixels]


def png_sheet(images_CFSS3: np.ndarray) -> bytes:
    """Returns one PNG file: a row per candidate, a column per new image."""
    num_candidates, num_images, *shape = images_CFSS3.shape
    pixels = images.to_uint8(images_CFSS3.reshape(num_candidates * num_images, *shape))
    return images.png_bytes(grids.grid(pixels, num_images))


class LatestPreview:
    """Passes the latest preview of a request from the worker thread to a stream. A slow stream skips older previews."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._changed = loop, asyncio.Event()
        self._lock = threading.Lock()
        self._latest: Preview | None = None

    def publish(self, preview: Preview | None) -> None:
        """Replaces the latest preview and wakes `wait`; None only wakes it. Callable from any thread."""
        with self._lock:
            self._latest = preview or self._latest
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._changed.set)

    async def wait(self) -> Preview | None:
        """Waits at most one heartbeat for `publish`. Returns the latest preview since the last call, or None."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), _HEARTBEAT_SECONDS)
        self._changed.clear()
        with self._lock:
            latest, self._latest = self._latest, None
        return latest

    @property
    def pending(self) -> bool:
        """Whether there is a preview that `wait` has not returned yet."""
        return self._latest is not None


async def events(future: "Future[Answer]", previews: LatestPreview) -> AsyncIterator[str]:
    """Yields the server-sent events of a request: previews, then the answer or an error."""
    from anyio import to_thread

    try:
        while not future.done():
            preview = await previews.wait()
            if preview is not None and not future.done():
                pictures = await to_thread.run_sync(_png_base64, preview.images)
                yield _event("partial", {"done": preview.done, "total": preview.total, "pictures": pictures})
            elif not future.done():
                yield ": waiting\n\n"
        try:
            yield _event("answer", await to_thread.run_sync(answer_body, future.result()))
        except CancelledError:
            yield _event("error", to_request_error(ClosedError(UNFINISHED)).body)
        except Exception as error:  # status 200 has been sent
            request_error = to_request_error(error)
            if request_error.status == 500:  # no error handler logs it after the start of a stream
                logging.exception("a stream failed")
            yield _event("error", request_error.body)
    finally:
        future.cancel()  # the client may have disconnected


def _event(name: str, body: dict) -> str:
    return f"event: {name}\ndata: {json.dumps(body)}\n\n"
