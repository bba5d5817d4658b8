"""Kind: mutated requests to the HTTP service, which runs in a thread with the small model of the repository."""

import base64
import http.client
import io
import json
import logging
import pathlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from campaign.attempts import Attempt, RefusedError, UnclearError, require, require_equal
from campaign.mutations import mutated, mutated_json
from EasyLM import flags
from evaluation.prompting import PrompterSettings
from evaluation.serving import ENGINE_FLAGS, Engine, EngineSettings, Limits
from evaluation.serving.app import make_app
from evaluation.serving.limits import with_idle_timeout

_DEMO_MODEL = pathlib.Path(__file__).parents[2] / "evaluation" / "demo_model"
_MOST_BODY = 1 << 20
_ENDPOINTS = ("/generate", "/perplexity", "/tokenize")
_MOST_MESSAGE = 2000


def requests(folder: pathlib.Path) -> Attempt:
    """Mutated bodies and headers. An answer has what the request asks for; other answers are errors of the client."""
    service = _Service()
    bodies = _bodies(service)
    right = {name: service.send(*_request(path, body)) for name, (path, body) in bodies.items()}
    for name, answer in right.items():
        require_equal(answer.status, 200, f"status of the whole request {name}: {answer.body[:300]!r}")

    def attempt(rng: np.random.Generator, case: pathlib.Path) -> None:
        name = str(rng.choice([*bodies]))
        path, body = bodies[name]
        head, data = _request(path, body)
        choice = rng.random()
        if choice < 0.5:
            data = mutated_json(rng, body)
        elif choice < 0.65:
            data = mutated(rng, data)
        elif choice < 0.8:
            head, data = _form(path, mutated(rng, base64.b64decode(body.get("pictures", [""])[0])))
        elif choice < 0.9:
            head, data = _form(path, _image(0))
            data = mutated(rng, data)
        whole = _with_length(head, data)
        if choice >= 0.9:
            whole = mutated(rng, whole)
        (case / "request").write_bytes(whole)
        service.errors.clear()
        answer = service.send_bytes(whole)
        require_equal(service.errors, [], "errors in the log of the service")
        if answer.status != 200:
            _check_error(answer)
        if choice < 0.65:
            _check_answer(path, data, body, answer, right[name])

    return attempt


class _Received(io.BytesIO):
    """The bytes that came back on a connection, as the socket that `http.client` reads."""

    def makefile(self, mode: str) -> io.BytesIO:
        """Returns itself."""
        return self


class _Answer:
    """A response: its status (0: the connection was closed), media type and body.

    Only the first one of a connection: to the service, what follows a request of a smaller length is a further request.
    """

    def __init__(self, received: bytes):
        response = http.client.HTTPResponse(_Received(received), method="POST")
        try:
            response.begin()
            self.status, self.body = response.status, response.read()
        except http.client.RemoteDisconnected:
            self.status, self.body = 0, b""
        except http.client.IncompleteRead as error:
            self.status, self.body = response.status, error.partial
        self.media_type = (response.headers or {}).get("content-type", "").partition(";")[0]


class _Service(logging.Handler):
    """The service on a port of its own.

    Attributes:
      errors: what it has logged as an error.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []
        logging.getLogger("uvicorn.error").addHandler(self)
        logging.getLogger().addHandler(self)
        config = flags.defaults(ENGINE_FLAGS)
        config.update({"warm_up": "", "max_new_pictures": 2, "checkpoint": str(_DEMO_MODEL)})
        engine = Engine.load(flags.to_dataclass(PrompterSettings, config), flags.to_dataclass(EngineSettings, config))
        self.resolution, self.tokens_per_image = engine.resolution, engine.tokens_per_image
        limits = Limits(body_bytes=_MOST_BODY, images=8, pixels=10**6, read_seconds=2, connections=16)
        self._socket = socket.create_server(("127.0.0.1", 0))
        settings = uvicorn.Config(make_app(engine, limits), http=with_idle_timeout(limits), log_level="error")
        server = uvicorn.Server(settings)
        threading.Thread(target=server.run, args=([self._socket],), daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Collects an error."""
        self.errors.append(logging.Formatter().format(record))

    def send(self, head: bytes, body: bytes) -> _Answer:
        """Sends a whole request."""
        return self.send_bytes(_with_length(head, body))

    def send_bytes(self, request: bytes) -> _Answer:
        """Sends bytes, and returns what comes back until the service closes the connection."""
        with socket.create_connection(self._socket.getsockname()) as connection:
            response = b""
            try:
                connection.sendall(request)
                while data := connection.recv(1 << 16):
                    response += data
            except (ConnectionResetError, BrokenPipeError):  # an answer before the whole request has arrived
                pass
        return _Answer(response)


def _bodies(service: _Service) -> dict[str, tuple[str, dict]]:
    pictures = [base64.b64encode(_image(seed)).decode() for seed in range(3)]
    tokens = np.random.default_rng(0).integers(0, 1024, (3, service.tokens_per_image)).tolist()
    settings = {"n_new_frames": 1, "n_candidates": 1, "context_frames": 4, "temperature": 1.0, "top_p": 1.0, "seed": 3}
    return {
        "pictures": ("/generate", {"pictures": pictures, **settings}),
        "tokens": ("/generate", {"tokens": tokens, **settings, "output": "json"}),
        "perplexity": ("/perplexity", {"pictures": pictures[:2], "targets": pictures[2:]}),
        "target_tokens": ("/perplexity", {"tokens": tokens[:2], "target_tokens": tokens[2:]}),
        "tokenize": ("/tokenize", {"pictures": pictures}),
    }


def _image(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def _request(path: str, body: dict) -> tuple[bytes, bytes]:
    return _head(path, "application/json"), json.dumps(body).encode()


def _head(path: str, media_type: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", f"Content-Type: {media_type}"]
    return "\r\n".join(lines).encode() + b"\r\n"


def _with_length(head: bytes, body: bytes) -> bytes:
    return head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def _form(path: str, image: bytes) -> tuple[bytes, bytes]:
    part = b'--edge\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n'
    body = part % (b"pictures", b'; filename="a.png"') + image + b"\r\n"
    body += part % (b"seed", b"") + b"3\r\n--edge--\r\n"
    return _head(path, "multipart/form-data; boundary=edge"), body


def _check_error(answer: _Answer) -> None:
    """Raises RefusedError if the answer is a clear error of the client, otherwise UnclearError."""
    if answer.status == 0:
        raise RefusedError("the connection was closed")
    message = answer.body.decode(errors="replace")
    if answer.media_type == "application/json":
        error = json.loads(answer.body)["error"]
        message = f"{error['code']}: {error['message']}"
    is_clear = len(message.splitlines()) == 1 and len(message) <= _MOST_MESSAGE
    if 400 <= answer.status < 500 and is_clear:
        raise RefusedError(message)
    raise UnclearError(f"status {answer.status}: {message[:_MOST_MESSAGE]}")


def _check_answer(path: str, data: bytes, body: dict, answer: _Answer, right: _Answer) -> None:
    """Raises WrongOutputError unless an answer to a JSON request has what it asks for."""
    asked = json.loads(data)
    if asked == body:
        require_equal(answer.body, right.body, "answer")
    elif answer.media_type == "image/png":
        Image.open(io.BytesIO(answer.body)).load()
    elif answer.media_type == "text/event-stream":
        require(b"event: answer" in answer.body or b"event: error" in answer.body, "the stream has no end")
    else:
        _CHECKS[path](asked, json.loads(answer.body))


def _check_generated(asked: dict, answer: dict) -> None:
    sizes = asked.get("n_candidates", 1), asked.get("n_new_frames", 1)
    require_equal((len(answer["pictures"]), len(answer["pictures"][0])), tuple(map(int, sizes)), "generated images")
    for picture in np.ravel(answer["pictures"]):
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            require_equal(image.size, (32, 32), "size of an image")


def _check_perplexity(asked: dict, answer: dict) -> None:
    targets = asked.get("targets") or asked.get("target_tokens") or []
    require_equal(len(answer["perplexities"]), len(targets), "targets")
    require(all(np.isfinite(value) and value >= 1 for value in answer["perplexities"]), "perplexities")


def _check_tokens(asked: dict, answer: dict) -> None:
    require_equal(len(answer["tokens"]), len(asked["pictures"]), "images")


_CHECKS: dict[str, Callable[[Any, Any], None]] = dict(
    zip(_ENDPOINTS, (_check_generated, _check_perplexity, _check_tokens), strict=True)
)
