"""Stands before the service (ASGI middleware): bounds what bodies may bring, how slowly, and how many come at once."""

import asyncio
import contextlib
import json
import time

from evaluation.uploads import Limits, Refused

# What is left of a refused body is read and dropped for so long: its sender reads no answer before its end.
_LINGER_SECONDS = 5.0


class Guard:
    """Raises `Refused` where the application reads a body that breaks the limits, and refuses one too many itself."""

    def __init__(self, app, limits: Limits):
        self._app, self._limits, self._open = app, limits, 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        body = _Body(receive, self._limits)
        self._open += 1
        try:
            if self._open > self._limits.connections:
                return await _answer(
                    Refused(503, "busy", f"{self._limits.connections} requests are open: no more are taken", 1),
                    body.before_end_of(send),
                )
            return await self._app(scope, body.receive, body.before_end_of(send))
        finally:
            self._open -= 1


class _Body:
    """The body of one request while it comes."""

    def __init__(self, receive, limits: Limits):
        self._receive, self._limits = receive, limits
        self._deadline = time.monotonic() + limits.read_seconds
        self._bytes, self._done = 0, False

    async def receive(self):
        """The next message, within the limits."""
        if self._done:
            return await self._receive()  # that the client has left
        try:
            message = await asyncio.wait_for(self._receive(), self._deadline - time.monotonic())
        except TimeoutError:
            raise Refused(
                408, "too_slow", f"the body did not come within {self._limits.read_seconds:g} seconds"
            ) from None
        self._count(message)
        if message["type"] == "http.disconnect":
            raise Refused(499, "client_left", "the client left before the end of its body")  # nobody reads it
        if self._bytes > self._limits.body_bytes:
            raise Refused(413, "body_too_large", f"a body has at most {self._limits.body_bytes} bytes")
        return message

    def _count(self, message) -> None:
        self._bytes += len(message.get("body", b""))
        self._done = message["type"] != "http.request" or not message.get("more_body", False)

    def before_end_of(self, send):
        """`send`, before whose first message the rest of the body is read."""

        async def read_then_send(message):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER_SECONDS):
                    while not self._done:
                        self._count(await self._receive())
            self._done = True
            await send(message)

        return read_then_send


async def _answer(refused: Refused, send) -> None:
    headers = {"content-type": "application/json", **refused.headers}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": encoded})
    await send({"type": "http.response.body", "body": json.dumps(refused.body).encode()})
