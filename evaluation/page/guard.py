"""Limits of the page's server: the size of a request's body, and the disk space of uploads and answers.

gradio stores uploads, and copies of all files that it shows, in a folder. `PageFiles` bounds this folder.
"""

import contextlib
import dataclasses
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

from evaluation.serving.limits import Body, Limits, Message, Receive, Send, send_error
from evaluation.serving.request_errors import RequestError

UPLOAD_BYTES = 64 * 2**20  # of one request: some photographs
STORED_BYTES = 256 * 2**20  # of all visitors
_OTHER_BODY_BYTES = 2**20  # the values of the page's fields: files are uploaded before
_KEPT_SECONDS = 3600  # age at which a file is removed
_PROTECTED_SECONDS = 60  # younger files are not removed to make room
_SWEEP_SECONDS = 60


class PageFiles:
    """The folder of uploads and answers: removes files after an hour, and the oldest ones when room is needed."""

    def __init__(self, folder: pathlib.Path, most_bytes: int = STORED_BYTES):
        """Keeps the files that are in the folder now, for good: those of the page itself."""
        self._folder, self._most_bytes, self._lock = folder, most_bytes, threading.Lock()
        self._own: set[pathlib.Path] = set()
        self._own = {path for path, _ in self._files()}
        self._reserved = 0  # bytes of uploads that are arriving

    @contextlib.contextmanager
    def reserved(self, num_bytes: int) -> Iterator[None]:
        """Makes room for an upload that arrives in this context.

        Raises:
          RequestError: with status 429, if the files of the last minute need all the room.
        """
        with self._lock:
            used = self.remove_old(self._most_bytes - self._reserved - num_bytes)
            if used + self._reserved + num_bytes > self._most_bytes:
                raise RequestError(
                    429, "uploads_full", "too many uploads in the last minute: try again later", _PROTECTED_SECONDS
                )
            self._reserved += num_bytes
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= num_bytes

    def remove_old(self, most_bytes: int | None = None) -> int:
        """Removes files older than an hour; then, if the others exceed `most_bytes`, the oldest of them.

        Returns the bytes of the files that remain.
        """
        files = sorted(self._files(), key=lambda file: file[1].st_mtime)
        used, now = sum(status.st_size for _, status in files), time.time()
        for path, status in files:
            age = now - status.st_mtime
            too_full = most_bytes is not None and used > most_bytes and age > _PROTECTED_SECONDS
            if age > _KEPT_SECONDS or too_full:
                with contextlib.suppress(OSError):  # a request removes it at the same time
                    path.unlink()
                    path.parent.rmdir()  # gradio makes a folder for each file
                used -= status.st_size
        return used

    def sweep(self) -> None:
        """Removes old files every minute, in a thread of its own, as long as the process runs."""

        def run() -> None:
            while True:
                time.sleep(_SWEEP_SECONDS)
                with self._lock:
                    self.remove_old(self._most_bytes)

        threading.Thread(target=run, name="removes old files", daemon=True).start()

    def _files(self) -> list[tuple[pathlib.Path, os.stat_result]]:
        """Returns the files of visitors, with their status."""
        files = []
        for path in self._folder.rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_file() and path not in self._own:
                    files.append((path, path.stat()))
        return files


class PageGuard:
    """ASGI middleware. Bounds the bodies of requests, and makes room for uploads before they are stored."""

    def __init__(self, app: Callable, files: PageFiles, limits: Limits):
        self._app, self._files = app, files
        self._uploads = dataclasses.replace(limits, body_bytes=UPLOAD_BYTES)
        self._others = dataclasses.replace(limits, body_bytes=_OTHER_BODY_BYTES)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        limits = self._uploads if is_upload else self._others
        body = Body(receive, limits)
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        drained = body.drained_before(send_and_note)
        try:
            num_bytes = _declared_bytes(scope, limits.body_bytes)
            if num_bytes > limits.body_bytes:  # FastAPI would answer the error of `body.receive` with 400
                raise RequestError(413, "body_too_large", f"a body has at most {limits.body_bytes} bytes")
            with self._files.reserved(num_bytes) if is_upload else contextlib.nullcontext():
                await self._app(scope, body.receive, drained)
        except RequestError as error:
            if not started:
                await send_error(error, drained)


def _declared_bytes(scope: Message, most: int) -> int:
    """Returns the declared size of the body; `most` if it is not declared."""
    for name, value in scope["headers"]:
        if name.lower() == b"content-length" and value.isdigit():
            return int(value)
    return most
