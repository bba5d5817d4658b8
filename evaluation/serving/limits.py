"""Limits of size, time and number, enforced before a request reaches the application.

`Guard` is ASGI middleware and limits requests. `with_idle_timeout` limits connections without a request.
"""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from evaluation.serving.request_errors import RequestError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Time to read the rest of a refused body: clients send their whole body before they read a response.
_DRAIN_SECONDS = 5.0
# More connections are closed at once, so that file descriptors do not run out.
_CONNECTIONS_PER_REQUEST = 2
_OPEN_BODIES = 16  # bodies of the largest size that fit into the memory of all open requests


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the size, time and number of requests.

    Attributes:
      body_bytes: size of the body. The bodies of all open requests together have at most 16 times this size.
      images: number of images.
      pixels: total number of pixels of the images, according to their headers.
      read_seconds: timeout of the header, of the body, and of the client for reading each part of the response.
      connections: number of open requests, including waiting ones. Twice as many connections are accepted.
    """

    body_bytes: int = 16 * 2**20
    images: int = 64
    pixels: int = 64 * 10**6
    read_seconds: float = 30.0
    connections: int = 256


class Guard:
    """ASGI middleware. Raises `RequestError` while the application reads a body that exceeds the limits.

    Adds `request_end` to the scope: a `contextlib.ExitStack` that is closed when the response is sent, or has failed.
    """

    def __init__(self, app: Callable, limits: Limits):
        self._app, self._limits, self._num_open = app, limits, 0
        self._memory = _Memory(_OPEN_BODIES * limits.body_bytes)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = Body(receive, self._limits, self._memory)
        self._num_open += 1
        try:
            with contextlib.ExitStack() as scope["request_end"]:
                await self._answer(scope, body, send)
        finally:
            self._num_open -= 1
            body.forget()

    async def _answer(self, scope: Message, body: "Body", send: Send) -> None:
        try:
            async with asyncio.timeout(None) as timeout:
                send = body.drained_before(self._with_timeout(timeout, send))
                if self._num_open > self._limits.connections:
                    message = f"{self._limits.connections} requests are open: no more are accepted"
                    await send_error(RequestError(503, "busy", message, 1), send)
                else:
                    await self._app(scope, body.receive, send)
        except TimeoutError:
            if not timeout.expired():
                raise
            # The client does not read the response. uvicorn closes the connection of an unfinished response.

    def _with_timeout(self, timeout: asyncio.Timeout, send: Send) -> Send:
        """Wraps `send`: `timeout` expires if the client does not read a message in time."""

        async def send_in_time(message: Message) -> None:
            timeout.reschedule(asyncio.get_running_loop().time() + self._limits.read_seconds)
            await send(message)
            timeout.reschedule(None)

        return send_in_time


@dataclasses.dataclass
class _Memory:
    """The bytes of the bodies of all open requests."""

    most: int
    used: int = 0


class Body:
    """The body of one request, while it arrives."""

    def __init__(self, receive: Receive, limits: Limits, memory: _Memory | None = None):
        """Limits the body alone, and together with the others that share `memory`."""
        self._receive, self._limits = receive, limits
        self._memory = memory or _Memory(limits.body_bytes)
        self._deadline = time.monotonic() + limits.read_seconds
        self._bytes, self._done = 0, False

    def forget(self) -> None:
        """Gives the body's share of the memory back."""
        self._memory.used -= self._bytes
        self._bytes = 0

    async def receive(self) -> Message:
        """Returns the next message.

        Raises:
          RequestError: if the body is too large or too slow, or the client disconnects.
        """
        if self._done:
            return await self._receive()  # returns when the client disconnects
        try:
            message = await asyncio.wait_for(self._receive(), self._deadline - time.monotonic())
        except TimeoutError:
            if self._done:  # `drained_before` received the end of the body meanwhile
                return await self._receive()
            raise RequestError(
                408, "too_slow", f"the body did not arrive within {self._limits.read_seconds:g} seconds"
            ) from None
        self._done = _is_last(message)
        if message["type"] == "http.disconnect":
            raise RequestError(499, "client_left", "the client disconnected before the end of its body")
        num_bytes = len(message.get("body", b""))
        self._bytes += num_bytes
        self._memory.used += num_bytes
        if self._bytes > self._limits.body_bytes:
            raise RequestError(413, "body_too_large", f"a body has at most {self._limits.body_bytes} bytes")
        if self._memory.used > self._memory.most:
            raise RequestError(503, "busy", f"the open requests have more than {self._memory.most} bytes", 1)
        return message

    def drained_before(self, send: Send) -> Send:
        """Wraps `send`: reads and drops the rest of the body before the first message."""

        async def drain_then_send(message: Message) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_SECONDS):
                    while not self._done:
                        self._done = _is_last(await self._receive())
            self._done = True
            await send(message)

        return drain_then_send


def _is_last(message: Message) -> bool:
    return message["type"] != "http.request" or not message.get("more_body", False)


async def send_error(error: RequestError, send: Send) -> None:
    """Sends an error response, outside of the application's error handlers."""
    headers, body = _header_and_body(error)
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _header_and_body(error: RequestError) -> tuple[list[tuple[bytes, bytes]], bytes]:
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    return [(name.encode(), value.encode()) for name, value in headers.items()], body


def with_idle_timeout(limits: Limits) -> type[asyncio.Protocol]:
    """Returns uvicorn's HTTP protocol with a timeout for connections that hold no request.

    A connection is closed if no header is completed within `read_seconds`, or if the client does not read the rest of
    a response for that time. Excess connections are closed at once. What is not HTTP gets an error response like all
    others. This is no ASGI middleware because an application does not see connections before their header is complete.
    """
    from h11 import IDLE, SEND_RESPONSE, Data, EndOfMessage, Response
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class IdleTimeoutProtocol(H11Protocol):
        def connection_made(self, transport):
            super().connection_made(transport)
            self._last_state, self._timer = None, None
            if len(self.connections) > _CONNECTIONS_PER_REQUEST * limits.connections:
                transport.abort()
            else:
                self._check_progress()

        def connection_lost(self, error):
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(error)

        def send_400_response(self, msg):
            error = RequestError(400, "bad_request", "this is not HTTP/1.1; the service does not speak HTTPS")
            if self.conn.our_state in (IDLE, SEND_RESPONSE):  # otherwise a response has begun
                headers, body = _header_and_body(error)
                for event in (Response(status_code=400, headers=headers), Data(data=body), EndOfMessage()):
                    self.transport.write(self.conn.send(event))
            self.transport.close()

        def _check_progress(self):
            idle = self.transport.is_closing() or self.conn.their_state is IDLE
            state = (self.cycle, self.transport.get_write_buffer_size()) if idle else None  # last request, unsent bytes
            if idle and state == self._last_state:
                self.transport.abort()
            else:
                self._last_state = state
                self._timer = self.loop.call_later(limits.read_seconds, self._check_progress)

    return IdleTimeoutProtocol
