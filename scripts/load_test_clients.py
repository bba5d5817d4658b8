"""Clients of scripts/load_test.py: valid requests, and hostile ones that the service must refuse or drop."""

import asyncio
import base64
import contextlib
import json
import os
import socket
import struct
import zlib
from collections.abc import Awaitable, Callable

import numpy as np

from tokenizer.media import images
from tokenizer.synthetic import scenes

MAX_BODY_MB = 1  # the service's limit in this test: a body that exceeds it is sent quickly
READ_SECONDS = 3.0  # the service's timeout in this test
RESPONSE_SECONDS = 120


async def send(
    port: int, body: bytes, path: str = "/generate", content_length: int | None = None, pause: float = 0.0
) -> tuple[int, str, bytes]:
    """Sends one request on its own connection. Returns status, header text and body of the response.

    Args:
      port: the service's port on this machine.
      body: the body.
      path: the endpoint.
      content_length: the declared length; None: that of the body.
      pause: seconds between bytes; 0: send the body at once.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reading = asyncio.ensure_future(reader.read())  # at once: the service may respond before the end of the body
    try:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {content_length or len(body)}\r\n\r\n".encode())
        for part in [body[i : i + 1] for i in range(len(body))] if pause else [body]:
            writer.write(part)
            await writer.drain()
            if pause:
                await asyncio.wait({reading}, timeout=pause)
            if reading.done():
                break
        response = await asyncio.wait_for(reading, RESPONSE_SECONDS)
    finally:
        reading.cancel()
        writer.close()
    header, _, body = response.partition(b"\r\n\r\n")
    return int(header.split(maxsplit=2)[1]), header.decode().lower(), body


def valid_body(number: int, num_images: int) -> bytes:
    """Returns a request whose prompt is frames of a scene. `number` is the seed of the scene and of the request."""
    frames = [frame["image"] for frame in scenes.clip(number, 64, num_images)]
    encoded = [base64.b64encode(images.png_bytes(frame)).decode() for frame in frames]
    return json.dumps({"pictures": encoded, "seed": number}).encode()


async def leave_early(port: int, bodies: list[bytes], rng: np.random.Generator) -> None:
    """Sends a valid request, or a part of it, and disconnects without waiting for the response."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    body = bodies[rng.integers(len(bodies))]
    num_sent = len(body) if rng.random() < 0.5 else rng.integers(len(body))
    writer.write(b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
    writer.write(b"content-length: %d\r\n\r\n" % len(body) + body[:num_sent])
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()


async def _expect_refusal(port: int, expected: int, body: bytes, **options) -> None:
    status, _, response = await send(port, body, **options)
    assert status == expected, f"{status} {response[:200]!r}, expected {expected}"
    assert set(json.loads(response)["error"]) == {"code", "message"}


async def _send_large_body(port: int) -> None:
    await _expect_refusal(port, 413, b" " * (MAX_BODY_MB * 2**20 + 1))


async def _send_bomb(port: int) -> None:
    """Sends a small PNG file whose header declares 10 gigabytes of pixels."""
    file = bytearray(images.png_bytes(np.zeros((1, 1, 3), np.uint8)))
    file[16:24] = struct.pack(">II", 60_000, 60_000)
    file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    body = json.dumps({"pictures": [base64.b64encode(file).decode()]}).encode()
    await _expect_refusal(port, 413, body, path="/tokenize")


async def _send_garbage(port: int) -> None:
    await _expect_refusal(port, 422, os.urandom(1000))


async def _send_no_image(port: int) -> None:
    body = json.dumps({"pictures": [base64.b64encode(os.urandom(1000)).decode()]}).encode()
    await _expect_refusal(port, 422, body)


async def _send_wrong_ids(port: int) -> None:
    await _expect_refusal(port, 422, json.dumps({"tokens": [[2**30] * 64] * 3}).encode())


async def _send_slowly(port: int) -> None:
    """Sends a body that would take a minute. Bytes after the refusal may reset the connection before it is read."""
    with contextlib.suppress(ConnectionError):
        await _expect_refusal(port, 408, b" " * 60, content_length=10_000, pause=1.0)


async def _never_read(port: int) -> None:
    """Does not read a streamed response that is larger than the socket buffers: the script of `/docs`.

    Small segments and a small window keep the buffers small.
    """
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=client, limit=1024)
        writer.write(b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: localhost\r\n\r\n")
        response = await asyncio.wait_for(reader.read(1), RESPONSE_SECONDS)  # the service's timeout starts now
        await asyncio.sleep(3 * READ_SECONDS)
        response += await asyncio.wait_for(reader.read(), RESPONSE_SECONDS)
        writer.close()
    header, _, body = response.partition(b"\r\n\r\n")
    assert header.startswith(b"HTTP/1.1 200"), header[:200]
    content_length = int(header.lower().partition(b"content-length: ")[2].split()[0])
    assert len(body) < content_length, "the service did not disconnect a client that does not read"


# The hostile clients, except `leave_early`, which sends valid requests.
HOSTILE: dict[str, Callable[[int], Awaitable[None]]] = {
    "too large": _send_large_body,
    "bomb": _send_bomb,
    "garbage": _send_garbage,
    "no picture": _send_no_image,
    "wrong ids": _send_wrong_ids,
    "slow": _send_slowly,
    "never reads": _never_read,
}
