"""Stands before the service: bounds what requests bring, how slowly they and their answers go, and how many there are.

`Guard` (ASGI middleware) sees requests; what has not become one, or is no longer, is the matter of `impatient`.
"""

import asyncio
import contextlib
import json
import time

from evaluation.serving.uploads import Limits, Refused

# What is left of a refused body is read and dropped for so long: its sender reads no answer before its end.
_LINGER_SECONDS = 5.0
# So many are held for each request that may be open: the rest is dropped unheard, before file descriptors run out.
_CONNECTIONS_PER_REQUEST = 2


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
            async with asyncio.timeout(None) as patience:
                send = body.before_end_of(self._within(patience, send))
                if self._open > self._limits.connections:
                    busy = f"{self._limits.connections} requests are open: no more are taken"
                    await _answer(Refused(503, "busy", busy, 1), send)
                else:
                    await self._app(scope, body.receive, send)
        except TimeoutError:
            if not patience.expired():
                raise
            # The client takes nothing of its answer: it gets no more, and the server closes what has no end.
        finally:
            self._open -= 1

    def _within(self, patience: asyncio.Timeout, send):
        """`send`, each of whose messages must have been taken in time: else the request is dropped."""

        async def send_in_time(message):
            patience.reschedule(asyncio.get_running_loop().time() + self._limits.read_seconds)
            await send(message)
            patience.reschedule(None)

        return send_in_time


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
            if self._done:  # the end went to who began to send meanwhile
                return await self._receive()
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


def impatient(limits: Limits):
    """uvicorn's HTTP protocol, which drops connections that hold no request and do not go on.

    That is, those on which for `read_seconds` no header comes to its end, or nothing is taken of an answer whose
    request is over. Only here is a connection known before its header has come.
    """
    from h11 import IDLE
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        def connection_made(self, transport):
            super().connection_made(transport)
            self._seen, self._timer = None, None
            if len(self.connections) > _CONNECTIONS_PER_REQUEST * limits.connections:
                transport.abort()
            else:
                self._look()

        def connection_lost(self, error):
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(error)

        def _look(self):
            rests = self.transport.is_closing() or self.conn.their_state is IDLE
            seen = (self.cycle, self.transport.get_write_buffer_size()) if rests else None  # the last request, unsent
            if rests and seen == self._seen:
                self.transport.abort()
            else:
                self._seen, self._timer = seen, self.loop.call_later(limits.read_seconds, self._look)

    return Impatient
