"""Helpers of serving tests: a tiny engine, image files, in-process requests, and a prompter that blocks on demand."""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import io
import json
import socket
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import jax
import numpy as np
from PIL import Image
from prompting_kit import CONFIG, tiny_params
from tokenizer_kit import TINY, smooth_image, tiny_vqgan

from EasyLM import flags
from EasyLM.parallel import make_mesh
from evaluation.prompting import Prompter
from evaluation.serving import ENGINE_FLAGS, Engine, EngineSettings, Limits
from evaluation.serving.limits import with_idle_timeout
from tokenizer.vqgan import Codec

SECONDS = 120  # timeout, much longer than any test takes
CODES, TOKENS = TINY.num_embeddings, TINY.tokens_per_image
MODEL = dataclasses.replace(CONFIG, vocab_size=CODES, max_sequence_length=4 * TOKENS)
PIXELS = 10**6
LIMITS = Limits(body_bytes=20_000, images=3, pixels=PIXELS, read_seconds=SECONDS, connections=16)
JSON_HEADER = {"content-type": "application/json"}


@functools.cache
def tiny_prompter() -> Prompter:
    """Returns a prompter on one device whose samples depend on the prompt and on the seed."""
    device = jax.devices()[:1]
    with tempfile.TemporaryDirectory() as directory:
        codec = Codec(tiny_vqgan(directory), batch_size=2, devices=device)
    return Prompter(codec, MODEL, tiny_params(MODEL, 5, 3), make_mesh("1,1,1", device))


def tiny_engine(prompter: Any = None, **settings: Any) -> Engine:
    """Returns an engine with these values of its flags."""
    config = flags.defaults(ENGINE_FLAGS)
    config.update({"warm_up": "", "max_batch": 4, **settings})
    return Engine(prompter or tiny_prompter(), flags.to_dataclass(EngineSettings, config))


class HeldPrompter:
    """The tiny prompter with a `generate` that waits for `release`, or raises.

    Attributes:
      failing: whether `generate` raises.
      begun: set when `generate` is called.
      release: lets `generate` return.
      batches: the number of prompts of each call.
    """

    def __init__(self, failing: bool = False):
        self.failing, self.begun, self.release = failing, threading.Event(), threading.Event()
        self.batches: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(tiny_prompter(), name)

    def generate(self, prompts, settings, *, seeds, progress):
        if self.failing:
            raise RuntimeError("the device is on fire")
        self.batches.append(len(prompts))
        self.begun.set()
        for _ in range(SECONDS * 1000):
            if self.release.wait(0.001):
                break
            progress(np.zeros((len(prompts), settings.num_candidates, 16), np.int32))
        return np.zeros((len(prompts), settings.num_candidates, 1, TOKENS), np.int32)

    def log_likelihoods(self, prompts, targets):
        return np.zeros((len(prompts), TOKENS), np.float32)


def wait_until(condition: Callable[[], Any]) -> None:
    """Waits for a condition that another thread makes true."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def png(seed: int, size: int = 20, **options: Any) -> bytes:
    """Returns a PNG file of `smooth_image`."""
    file = io.BytesIO()
    Image.fromarray(smooth_image(seed, size)).save(file, "PNG", **options)
    return file.getvalue()


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """Returns a PNG file whose header declares an image of this size. It has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT"


def pixels_of(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)))


def base64_of(*files: bytes) -> list[str]:
    return [base64.b64encode(file).decode() for file in files]


def form(*files: bytes, name: str = "pictures", **fields: Any) -> dict[str, Any]:
    """Returns the httpx options of a form."""
    return {"files": [(name, file) for file in files], "data": {key: str(value) for key, value in fields.items()}}


def ask(app: Any, *requests: tuple[str, str, dict]) -> list[httpx.Response]:
    """Sends requests (method, path, httpx options) at the same time and returns their responses."""

    async def send():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            responses = (client.request(method, path, **options) for method, path, options in requests)
            return await asyncio.wait_for(asyncio.gather(*responses), SECONDS)

    return asyncio.run(send())


def post(app: Any, path: str, **options: Any) -> httpx.Response:
    return ask(app, ("POST", path, options))[0]


def events_of(response: httpx.Response) -> list[tuple[str, dict]]:
    """Returns the server-sent events of a stream: (name, body)."""
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    lines = [block.split("\n") for block in blocks]
    return [(event.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for event, data in lines]


def assert_error(response: httpx.Response, status: int, code: str, *parts: str) -> None:
    """Asserts that a response is an error with this status and code, and these parts in its message."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"} and set(response.json()["error"]) == {"code", "message"}
    assert response.json()["error"]["code"] == code
    for part in parts:
        assert part in response.json()["error"]["message"]


async def serve_while(app: Any, limits: Limits, scenario: Callable) -> Any:
    """Serves an application on a free port while `scenario(port, server)` runs."""
    import uvicorn

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        config = uvicorn.Config(app, http=with_idle_timeout(limits), lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listener]))
        try:
            return await scenario(listener.getsockname()[1], server)
        finally:
            server.should_exit = True
            await serving


async def exchange(port: int, first: bytes, rest: bytes = b"", pause: float = 0.0) -> bytes:
    """Sends bytes, and after a pause the rest. Returns everything that the server sends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer), contextlib.suppress(ConnectionError):
        writer.write(first)
        await asyncio.sleep(pause)
        writer.write(rest)
        return await reader.read()
    return b""
