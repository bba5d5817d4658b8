"""The service, in process: every endpoint, every limit, every error; and once as a process that is told to stop."""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import load_test
import numpy as np
import pytest
from PIL import Image
from serve_kit import CODES, TINY, bomb, png, tiny_engine, tiny_prompter

from EasyLM import flags
from EasyLM.errors import UserError
from evaluation import demo, serve
from evaluation.prompting import GenerationSettings
from evaluation.serving import responses
from evaluation.serving.app import make_app
from evaluation.serving.engine import Prompt, Settings
from evaluation.serving.limits import Guard, impatient
from evaluation.serving.uploads import Limits
from evaluation.tasks import metrics
from tokenizer.media import images

SECONDS = 120
PIXELS = 10**6
LIMITS = Limits(body_bytes=20_000, pictures=3, pixels=PIXELS, read_seconds=SECONDS, connections=16)
TOKENS = TINY.tokens_per_image


@pytest.fixture(scope="module")
def engine():
    engine = tiny_engine()
    yield engine
    engine.close(SECONDS)


@pytest.fixture(scope="module")
def app(engine):
    return make_app(engine, LIMITS)


def until(condition):
    """Waits for what comes about in another thread."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def ask(app, *requests):
    """The answers to requests (method, path, options of httpx), all sent at the same time."""

    async def send():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            sent = (client.request(method, path, **options) for method, path, options in requests)
            return await asyncio.wait_for(asyncio.gather(*sent), SECONDS)

    return asyncio.run(send())


def post(app, path, **options):
    return ask(app, ("POST", path, options))[0]


def form(*files, name="pictures", **fields):
    return {"files": [(name, file) for file in files], "data": {key: str(value) for key, value in fields.items()}}


def base64_of(*files):
    return [base64.b64encode(file).decode() for file in files]


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)))


def assert_refused(response, status, code, *said):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"} and set(response.json()["error"]) == {"code", "message"}
    assert response.json()["error"]["code"] == code
    for part in said:
        assert part in response.json()["error"]["message"]


def test_files_base64_and_tokens_are_the_same_prompt(app):
    tokens = post(app, "/tokenize", **form(png(1))).json()["tokens"]
    assert np.shape(tokens) == (1, TOKENS) and len(set(tokens[0])) > 3
    np.testing.assert_array_equal(
        tokens, tiny_prompter().encode(images.load(io.BytesIO(png(1)), TINY.resolution)[None])
    )
    asked = {"seed": 5, "n_candidates": 2}
    answers = [
        post(app, "/generate", **form(png(1), **asked)),
        post(app, "/generate", json={"pictures": base64_of(png(1)), **asked}),
        post(app, "/generate", json={"tokens": tokens, **asked}),
    ]
    assert all(answer.status_code == 200 for answer in answers), answers[0].text
    assert answers[0].json() == answers[1].json() == answers[2].json()
    answer = answers[0].json()
    drawn = tiny_prompter().generate([np.array(tokens)], GenerationSettings(num_candidates=2, seed=5))
    np.testing.assert_array_equal(answer["tokens"], drawn[0])
    shown = np.stack([[pixels(base64.b64decode(file)) for file in row] for row in answer["pictures"]])
    np.testing.assert_array_equal(shown, images.to_uint8(tiny_prompter().decode(drawn[0])))


def test_what_a_seed_gives_is_the_same_alone_and_in_a_batch(app):
    requests = [("POST", "/generate", form(png(i), n_candidates=2, seed=seed)) for i, seed in ((1, 5), (1, 6), (2, 6))]
    engine = tiny_engine(batch_window_ms=1000 * SECONDS)

    def close_once_three_wait():  # which has them taken
        until(lambda: len(engine._batcher._waiting) == 3)
        assert engine.close(SECONDS)

    with ThreadPoolExecutor() as threads:
        closing = threads.submit(close_once_three_wait)
        together = [answer.json() for answer in ask(make_app(engine, LIMITS), *requests)]
        closing.result()
    assert [answer.pop("batch") for answer in together] == [3, 3, 3]
    for request, answer in zip(requests, together, strict=True):
        alone = ask(app, request)[0].json()
        assert alone.pop("batch") == 1
        assert alone == answer
    assert len({str(answer["tokens"]) for answer in together}) == 3


def test_a_picture_is_answered_as_a_picture(app):
    by_header = post(app, "/generate", **form(png(1), n_candidates=2), headers={"accept": "image/png"})
    by_field = post(app, "/generate", **form(png(1), n_candidates=2, output="png"))
    assert by_header.headers["content-type"] == by_field.headers["content-type"] == "image/png"
    assert by_header.content == by_field.content
    assert pixels(by_header.content).shape == (2 * TINY.resolution + 2, TINY.resolution, 3)


def events_of(response) -> list[tuple[str, dict]]:
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    lines = [block.split("\n") for block in blocks]
    return [(event.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for event, data in lines]


def test_a_stream_shows_the_picture_row_by_row_and_ends_with_the_answer(app, monkeypatch):
    monkeypatch.setattr("evaluation.serving.progress._SHARE", -1)  # no time without pictures

    def tell(news, newest, real=responses.News.tell):
        real(news, newest)
        until(lambda: news._newest is None)  # else a slow stream misses it

    monkeypatch.setattr(responses.News, "tell", tell)
    asked = form(png(1), n_candidates=2, seed=5)
    response = post(app, "/generate", **asked, headers={"accept": "text/event-stream"})
    assert response.headers["content-type"].startswith("text/event-stream")
    *partials, (last, answer) = events_of(response)
    assert last == "answer" and answer == post(app, "/generate", **asked).json()
    assert partials and {name for name, _ in partials} == {"partial"}
    assert [one["done"] for _, one in partials] == sorted({one["done"] for _, one in partials})
    for _, one in partials:
        assert one["total"] == TOKENS and 0 < one["done"] < TOKENS
        drawn_rows = one["done"] // 8 * TINY.resolution // 8
        shown = np.stack([pixels(base64.b64decode(row[0])) for row in one["pictures"]])
        assert shown.shape == (2, TINY.resolution, TINY.resolution, 3)
        assert (shown[:, drawn_rows:] == 128).all() and (shown[:, :drawn_rows] != 128).any()


def test_perplexity_is_the_models_own(app):
    prompter = tiny_prompter()
    prompt, target = (prompter.encode(images.load(io.BytesIO(png(i)), TINY.resolution)[None]) for i in (1, 2))
    expected = metrics.perplexity(prompter.log_likelihoods([prompt], [target]))[0]
    files = [("pictures", png(1)), ("targets", png(2))]
    by_files = post(app, "/perplexity", files=files).json()
    by_tokens = post(app, "/perplexity", json={"tokens": prompt.tolist(), "target_tokens": target.tolist()}).json()
    assert by_files == by_tokens
    assert by_files["perplexity"] == pytest.approx(expected) == by_files["perplexities"][0]


async def chunks(data: bytes):
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]


JSON_HEADER = {"content-type": "application/json"}
WRONG_ROW = [[CODES] * TOKENS]
REFUSALS = {
    "declared too large": ({"content": b"x" * 30_000, "headers": JSON_HEADER}, 413, "body_too_large", "20000"),
    "too large in parts": (lambda: {"content": chunks(b"x" * 30_000), "headers": JSON_HEADER}, 413, "body_too_large"),
    "form too large": (form(b"x" * 30_000), 413, "body_too_large"),
    "too many": (form(*[png(1)] * 4), 413, "too_many_pictures", "4", "at most 3"),
    "far too many": (form(*[b"x"] * 20), 422, "invalid_form"),
    "too many pixels": (form(bomb(1001, 1000)), 413, "too_many_pixels", "pictures[0]", "1001 x 1000", str(PIXELS)),
    "too many in all": (form(bomb(800, 800), bomb(800, 800)), 413, "too_many_pixels", "pictures[1]"),
    "a bomb": (form(bomb()), 413, "too_many_pixels", "pictures[0]"),
    "no picture": (form(png(1), b"garbage"), 422, "invalid", "pictures[1]", "not a readable picture", "PNG, JPEG"),
    "an empty file": (form(b""), 422, "invalid", "pictures[0]"),
    "half a picture": (form(png(1)[:200]), 422, "invalid", "pictures[0]", "broken"),
    "another file": ({"files": [("x", b"x")]}, 422, "invalid", "x: Extra inputs"),
    "a file for a number": ({"files": [("pictures", png(1)), ("seed", b"1")]}, 422, "invalid", "seed"),
    "nothing": ({"json": {}}, 422, "invalid", "either pictures or tokens"),
    "no pictures": ({"json": {"pictures": []}}, 422, "invalid", "at least one picture"),
    "two prompts": ({"json": {"pictures": base64_of(png(1)), "tokens": WRONG_ROW}}, 422, "invalid", "either"),
    "a long prompt": ({"json": {"tokens": [[0] * TOKENS] * 4}}, 422, "invalid", "4 pictures", "at most 3"),
    "wrong id": ({"json": {"tokens": WRONG_ROW}}, 422, "invalid", f"token id {CODES}", f"0 to {CODES - 1}"),
    "negative id": ({"json": {"tokens": [[-1] * TOKENS]}}, 422, "invalid", "tokens.0.0"),
    "huge id": ({"json": {"tokens": [[10**30] * TOKENS]}}, 422, "invalid", "tokens.0.0"),
    "ragged": ({"json": {"tokens": [[1], [1, 2]]}}, 422, "invalid", "different numbers"),
    "short": ({"json": {"tokens": [[1, 2]]}}, 422, "invalid", f"each picture has {TOKENS}"),
    "no base64": ({"json": {"pictures": ["?!"]}}, 422, "invalid", "pictures.0", "base64"),
    "no JSON": ({"content": b"{", "headers": JSON_HEADER}, 422, "invalid", "JSON"),
    "deep JSON": ({"content": b"[" * 9_000, "headers": JSON_HEADER}, 422, "invalid", "JSON"),
    "no kind": ({"content": b"{}"}, 415, "unsupported_media_type"),
    "no boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 422, "invalid_form"),
    "misspelt": ({"json": {"picture": []}}, 422, "invalid", "picture: Extra inputs"),
    "no number": (form(png(1), seed="x"), 422, "invalid", "seed"),
    "seed": (form(png(1), seed=-1), 422, "invalid", "seed=-1", "0..2147483647"),
    "temperature": (form(png(1), temperature=-1), 422, "invalid", "temperature=-1.0"),
    "temperature nan": (form(png(1), temperature="nan"), 422, "invalid", "temperature=nan"),
    "top_p": (form(png(1), top_p=0), 422, "invalid", "top_p=0.0"),
    "top_k": (form(png(1), top_k=-1), 422, "invalid", "top_k=-1"),
    "context": (form(png(1), context_frames=1), 422, "invalid", "context_frames=1"),
    "no candidates": (form(png(1), n_candidates=0), 422, "invalid", "n_candidates=0"),
    "many answers": (form(png(1), n_candidates=9, n_new_frames=9), 422, "invalid", "at most 64"),
    "output": (form(png(1), output="gif"), 422, "invalid", "output"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_breaks_a_limit_or_is_wrong_is_named(app, name):
    options, status, code, *said = REFUSALS[name]
    response = post(app, "/generate", **(options() if callable(options) else options))
    assert_refused(response, status, code, *said)


def test_other_endpoints_refuse_alike(app):
    assert_refused(post(app, "/tokenize", **form(bomb())), 413, "too_many_pixels")
    assert_refused(post(app, "/tokenize", json={"tokens": WRONG_ROW}), 422, "invalid", "tokens: Extra inputs")
    assert_refused(post(app, "/perplexity", **form(png(1))), 422, "invalid", "either targets or target_tokens")
    rows = {"tokens": [[0] * TOKENS] * 3, "target_tokens": [[0] * TOKENS] * 2}
    assert_refused(post(app, "/perplexity", json=rows), 422, "invalid", "3 pictures and 2 targets", "holds 4")
    many = [("pictures", png(1)), ("pictures", png(1)), ("targets", png(1)), ("targets", png(1))]
    assert_refused(post(app, "/perplexity", files=many), 413, "too_many_pictures", "targets: 4", "at most 3")
    large = [("pictures", bomb(800, 800)), ("targets", bomb(800, 800))]
    assert_refused(post(app, "/perplexity", files=large), 413, "too_many_pixels", "targets[0]")
    nowhere, wrong_method = ask(app, ("GET", "/nowhere", {}), ("GET", "/generate", {}))
    assert_refused(nowhere, 404, "http_404")
    assert_refused(wrong_method, 405, "http_405")


def test_a_token_is_asked_for_before_the_body_is_read(engine):
    app = make_app(engine, LIMITS, token="sesame")
    for headers in ({}, {"authorization": "Bearer sesam"}, {"authorization": "Basic sesame"}):
        response = post(app, "/generate", content=b"x" * 30_000, headers=headers)
        assert_refused(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    right = post(app, "/tokenize", **form(png(1)), headers={"authorization": "Bearer sesame"})
    assert right.status_code == 200
    assert ask(app, ("GET", "/ready", {}))[0].json()["resolution"] == TINY.resolution


def test_a_slow_body_and_one_connection_too_many(engine):
    async def never(event=None):
        yield b"{"
        await asyncio.sleep(SECONDS)

    app = make_app(engine, Limits(read_seconds=0.05, connections=1))
    options = {"content": never(), "headers": JSON_HEADER}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.serving.limits._LINGER_SECONDS", 0.05)
        slow, other = ask(app, ("POST", "/generate", options), ("GET", "/ready", {}))
    assert_refused(slow, 408, "too_slow", "0.05 seconds")
    assert_refused(other, 503, "busy")
    assert other.headers["retry-after"] == "1"
    assert ask(app, ("GET", "/ready", {}))[0].json()["state"] == "warming up"  # the place is free again


class HeldPrompter:
    """The tiny prompter, whose answers wait until they may come; `failing`: they never do."""

    def __init__(self, failing=False):
        self.failing, self.begun, self.may_go_on = failing, threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(tiny_prompter(), name)

    def generate(self, prompts, settings, *, seeds, progress):
        if self.failing:
            raise RuntimeError("the device is on fire")
        self.begun.set()
        for _ in range(SECONDS * 1000):
            if self.may_go_on.wait(0.001):
                break
            progress(np.zeros((len(prompts), settings.num_candidates, 16), np.int32))
        return np.zeros((len(prompts), settings.num_candidates, 1, TOKENS), np.int32)

    def log_likelihoods(self, prompts, targets):
        return np.zeros((len(prompts), TOKENS), np.float32)


def test_a_full_queue_and_a_stopping_service():
    prompter = HeldPrompter()
    engine = tiny_engine(prompter, max_batch=1, max_queue=1)
    app = make_app(engine, LIMITS)

    async def scenario():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            runs = asyncio.create_task(client.post("/generate", **form(png(1))))
            await asyncio.to_thread(prompter.begun.wait, SECONDS)
            both = [asyncio.create_task(client.post("/generate", **form(png(1)))) for _ in range(2)]
            refused, waiting = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            closing = asyncio.create_task(asyncio.to_thread(engine.close, SECONDS))
            while engine.state != "stopping":
                await asyncio.sleep(0.001)
            stopping, ready = await client.post("/generate", **form(png(1))), await client.get("/ready")
            prompter.may_go_on.set()
            return await refused.pop(), stopping, ready, await runs, await waiting.pop(), await closing

    full, stopping, ready, ran, waited, closed = asyncio.run(asyncio.wait_for(scenario(), SECONDS))
    assert_refused(full, 429, "queue_full", "try again in")
    assert int(full.headers["retry-after"]) >= 1
    assert_refused(stopping, 503, "stopping")
    assert ready.status_code == 503 and ready.json()["state"] == "stopping"
    assert ran.status_code == waited.status_code == 200 and closed


def test_a_fault_is_answered_and_the_next_request_is_served(caplog):
    prompter = HeldPrompter(failing=True)
    engine = tiny_engine(prompter)
    app = make_app(engine, LIMITS)
    failed = post(app, "/generate", **form(png(1)))
    assert_refused(failed, 500, "internal")
    assert "fire" not in failed.text
    streamed = events_of(post(app, "/generate", **form(png(1), output="stream")))
    assert [(name, body["error"]["code"]) for name, body in streamed] == [("error", "internal")]
    assert "the device is on fire" in caplog.text
    prompter.failing = False
    prompter.may_go_on.set()
    assert post(app, "/generate", **form(png(1))).status_code == 200
    assert engine.close(SECONDS)


SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/generate",
    "headers": [(b"content-type", b"application/json")],
    "query_string": b"",
}


def asgi(app, messages, before_leaving=lambda: None) -> list[dict]:
    """What an application sends to a client that sends these messages, and leaves."""
    sent, left = [], list(messages)

    async def receive():
        if left:
            return left.pop(0)
        await asyncio.to_thread(before_leaving)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(SCOPE, receive, send), SECONDS))
    return sent


@pytest.mark.parametrize("output", ["json", "stream"])
def test_nothing_is_computed_for_a_client_that_has_left(output):
    prompter = HeldPrompter()
    engine = tiny_engine(prompter)
    body = json.dumps({"pictures": base64_of(png(1)), "output": output}).encode()
    message = {"type": "http.request", "body": body, "more_body": False}
    asgi(make_app(engine, LIMITS), [message], lambda: prompter.begun.wait(SECONDS))
    assert engine.close(SECONDS)  # nobody let the prompter go on: it has been stopped


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault(app):
    sent = asgi(app, [{"type": "http.request", "body": b"{", "more_body": True}])
    assert sent[0]["status"] == 499


def test_a_client_that_takes_nothing_of_its_answer_is_dropped():
    prompter = HeldPrompter()
    engine = tiny_engine(prompter)
    app = make_app(engine, Limits(read_seconds=0.3, connections=1))
    body = json.dumps({"pictures": base64_of(png(1)), "output": "stream"}).encode()
    messages, sent = [{"type": "http.request", "body": body, "more_body": False}], []

    async def receive():
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)
        if message["type"] == "http.response.body":  # the buffers are full
            await asyncio.Event().wait()

    asyncio.run(asyncio.wait_for(app(SCOPE, receive, send), SECONDS))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert engine.close(SECONDS)  # nobody let the prompter go on: it has been stopped
    assert ask(app, ("GET", "/ready", {}))[0].json()["state"] == "stopping"  # the place is free again


def test_who_listens_while_an_answer_is_sent_waits_for_the_client_to_leave():
    """As Starlette's answers with a file do: their body's end may be read by `send`."""
    messages = [{"type": "http.request", "body": b"", "more_body": False}]
    heard, calls = [], []

    async def app(scope, receive, send):
        listening = asyncio.create_task(receive())
        while not calls:
            await asyncio.sleep(0)  # until it really listens
        await send({"type": "http.response.start", "status": 200, "headers": []})
        heard.append(await listening)

    async def receive():
        calls.append(None)
        if len(calls) == 1:
            await asyncio.Event().wait()  # the listener's
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message):
        pass

    asyncio.run(asyncio.wait_for(Guard(app, Limits(read_seconds=0.5))(SCOPE, receive, send), SECONDS))
    assert heard == [{"type": "http.disconnect"}]


async def _connections_of(app, limits, scenario):
    """A server of the application on a free port, while `scenario(port, server)` runs."""
    import uvicorn

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        config = uvicorn.Config(app, http=impatient(limits), lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve([listener]))
        try:
            return await scenario(listener.getsockname()[1], server)
        finally:
            server.should_exit = True
            await serving


async def _said_to(port, sent: bytes, rest: bytes = b"", pause=0.0) -> bytes:
    """All that a client gets that sends this and, after a pause, the rest."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    await asyncio.sleep(pause)
    writer.write(rest)
    with contextlib.suppress(ConnectionError):
        return await reader.read()
    return b""


@pytest.mark.slow
def test_a_connection_without_a_whole_header_is_dropped_and_others_are_not():
    request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    limits = Limits(read_seconds=2)

    async def app(scope, receive, send):
        await asyncio.sleep(5)  # one that waits for its answer may take its time
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"done"})

    async def scenario(port, server):
        clients = (b"",), (request[:9],), (request,), (request[:9], request[9:], 0.2), (request + request[:9],)
        return await asyncio.gather(*(_said_to(port, *client) for client in clients))

    answers = asyncio.run(asyncio.wait_for(_connections_of(app, limits, scenario), SECONDS))
    assert [answer.count(b"done") for answer in answers] == [0, 0, 1, 1, 1]


def test_connections_are_counted_before_they_send_anything():
    async def scenario(port, server):
        clients = [asyncio.create_task(_said_to(port, b"")) for _ in range(3)]
        dropped, held = await asyncio.wait(clients, return_when=asyncio.FIRST_COMPLETED)
        for client in held:
            client.cancel()
        return [await one for one in dropped]

    limits = Limits(connections=1)  # so that two are held, and for long
    assert asyncio.run(asyncio.wait_for(_connections_of(None, limits, scenario), SECONDS)) == [b""]


def test_what_is_not_taken_of_an_answer_is_dropped_in_the_end():
    size = 2 * 10**7  # more than any buffer on the way holds
    answering = asyncio.Event()

    async def app(scope, receive, send):
        answering.set()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": bytes(size)})

    async def scenario(port, server):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1000)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await answering.wait()
        while server.server_state.connections:
            await asyncio.sleep(0.01)
        with contextlib.suppress(ConnectionError):
            return len(await reader.read())
        return 0

    got = asyncio.run(asyncio.wait_for(_connections_of(app, Limits(read_seconds=0.3), scenario), SECONDS))
    assert got < size


def test_it_is_ready_once_it_is_warm():
    engine = tiny_engine(HeldPrompter(), warm_up="1,9", max_batch=2)
    engine._prompter.may_go_on.set()
    assert engine.state == "warming up"
    engine.warm_up(Settings()).result(SECONDS)
    until(lambda: engine.state != "warming up")  # the engine hears of it just after those who wait
    assert engine.state == "ready"
    ready = ask(make_app(engine), ("GET", "/ready", {}))[0]
    assert ready.status_code == 200
    assert ready.json()["ready"] is True and ready.json()["max_pictures"] == 3
    engine.close(SECONDS)


def test_requests_that_are_not_done_in_time_are_told_so_when_the_service_stops():
    prompter = HeldPrompter()
    engine = tiny_engine(prompter, max_batch=1)
    app = make_app(engine, LIMITS)

    async def scenario():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            asked = [form(png(1)), form(png(1), output="stream"), form(png(1))]
            waiting = [asyncio.create_task(client.post("/generate", **options)) for options in asked]
            await asyncio.to_thread(prompter.begun.wait, SECONDS)
            while len(engine._batcher._waiting) < 2:
                await asyncio.sleep(0.001)
            assert not await asyncio.to_thread(engine.close, 0.01)
            return await asyncio.gather(*waiting)

    first, stream, last = asyncio.run(asyncio.wait_for(scenario(), SECONDS))
    for answer in (first, last):
        assert_refused(answer, 503, "stopping", "not done in time")
    assert 'event: error\ndata: {"error": {"code": "stopping"' in stream.text
    assert engine.close(SECONDS)  # the batch under way sees that nobody waits


def test_a_warm_up_ends_early_when_the_service_stops_and_says_when_it_fails(caplog):
    prompter = HeldPrompter()
    engine = tiny_engine(prompter, warm_up="1,2", max_batch=2)
    drawn = []
    prompter.generate = lambda prompts, *_, **__: drawn.append(len(prompts)) or _held(prompter, prompts)
    future = engine.warm_up(Settings())
    assert prompter.begun.wait(SECONDS) and not engine.close(0.01)
    prompter.may_go_on.set()
    assert engine.close(SECONDS) and future.cancelled()
    assert drawn == [1]
    failing = tiny_engine(HeldPrompter(failing=True), warm_up="1")
    assert demo._first_status(failing).startswith("Compiling")
    assert failing.warm_up(Settings()).exception(SECONDS)
    until(lambda: failing.state != "warming up")
    assert demo._first_status(failing).startswith("Warming up failed (RuntimeError: the device is on fire)")
    assert failing.state == "failed" and failing.close(SECONDS)
    assert failing.state == "stopping" and "warming up failed" in caplog.text and "on fire" in caplog.text


def _held(prompter, prompts):
    prompter.begun.set()
    assert prompter.may_go_on.wait(SECONDS)
    return np.zeros((len(prompts), 1, 1, TOKENS), np.int32)


@pytest.mark.parametrize("signals, code", [(1, 0), (2, 1)])
def test_a_second_signal_drops_what_runs_and_the_exit_code_says_so(monkeypatch, signals, code):
    prompter = HeldPrompter()
    engine = tiny_engine(prompter)

    def run(server):
        engine.generate(Prompt(tokens=np.zeros((1, TOKENS), np.int32)), Settings(), lambda newest: None)
        assert prompter.begun.wait(SECONDS)
        for _ in range(signals):
            server.handle_exit(signal.SIGTERM, None)
        if signals == 1:
            prompter.may_go_on.set()
            until(lambda: server.should_exit)

    monkeypatch.setattr("uvicorn.Server.run", run)
    config = flags.defaults(serve.FLAGS)
    assert serve.serve(engine, LIMITS, config) == code
    prompter.may_go_on.set()
    assert engine.close(SECONDS)


def test_the_page_of_the_schema_needs_nothing_from_elsewhere(app):
    page, schema = ask(app, ("GET", "/docs", {}), ("GET", "/openapi.json", {}))
    assert "//" not in page.text.replace("http://test", "")
    for path in ("/generate", "/perplexity", "/tokenize"):
        described = schema.json()["paths"][path]["post"]
        assert set(described["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
        assert {"401", "413", "422", "429", "503"} <= set(described["responses"])
        fields = described["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert all(field["description"] for field in fields.values())


@pytest.mark.parametrize(
    "flag, value, said",
    [
        ("max_batch", 3, "--max_batch=3: must be a power of two"),
        ("max_queue", 0, "--max_queue=0: must be at least 1"),
        ("warm_up", "x", "--warm_up=x"),
        ("max_body_mb", 0, "--max_body_mb=0"),
        ("read_seconds", 0.0, "--read_seconds=0.0"),
        ("stop_seconds", float("inf"), "--stop_seconds=inf"),
        ("port", 70000, "--port=70000"),
        ("token", "sésame", "--token: must be of ASCII characters"),
    ],
)
def test_wrong_flags_are_named(flag, value, said):
    config = flags.defaults(serve.FLAGS)
    config[flag] = value
    with pytest.raises(UserError) as error:
        if flag in ("port", "token"):
            serve.main(config)
        serve.limits_of(config)
        tiny_engine(**{flag: value})
    assert said in str(error.value)


@pytest.mark.parametrize("program, package", [(serve, "uvicorn"), (demo, "gradio")])
def test_a_missing_package_is_named_before_the_model_is_loaded(monkeypatch, program, package):
    monkeypatch.setitem(sys.modules, package, None)
    config = flags.defaults(program.FLAGS)
    config.checkpoint = "none"
    with pytest.raises(UserError, match=rf"needs the package {package}: pip install -e '\.\[serve\]'"):
        program.main(config)


@pytest.mark.slow
def test_sigterm_finishes_what_runs_and_exits_with_0(port):
    command = [sys.executable, "-m", "EasyLM.models.llama.llama_serve", "--checkpoint=evaluation/demo_model"]
    command += [f"--port={port}", "--warm_up=1", "--max_batch=1", "--token=$SERVICE_TOKEN"]
    environment = os.environ | {"SERVICE_TOKEN": "sesame"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        asyncio.run(asyncio.wait_for(_stopped_on_the_way(server, f"http://127.0.0.1:{port}"), 3 * SECONDS))
        output, _ = server.communicate(timeout=SECONDS)
        assert server.returncode == 0, output
        assert "Traceback" not in output
    finally:
        server.kill()


@pytest.mark.slow
def test_a_port_that_is_taken_ends_it_with_1_though_it_is_warming_up():
    command = [sys.executable, "-m", "EasyLM.models.llama.llama_serve", "--checkpoint=evaluation/demo_model"]
    with socket.create_server(("127.0.0.1", 0)) as owner:
        command.append(f"--port={owner.getsockname()[1]}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 1, done.stderr
    assert "address already in use" in done.stderr and "Fatal" not in done.stderr


async def _stopped_on_the_way(server, url):
    headers = {"authorization": "Bearer sesame"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=3 * SECONDS) as client:
        while server.poll() is None:
            try:
                if (await client.get("/ready")).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)
        options = form(png(1), n_new_frames=4, n_candidates=16, output="stream")  # takes seconds
        async with client.stream("POST", "/generate", **options) as stream:
            assert stream.status_code == 200
            lines = stream.aiter_lines()
            while (line := await anext(lines)) != "event: partial":
                assert line in (": waiting", "")  # while it is compiled
            server.send_signal(signal.SIGTERM)
            while (await client.get("/ready")).json()["state"] != "stopping":
                await asyncio.sleep(0.01)
            late = await client.post("/generate", **form(png(1)))
            assert late.status_code == 503 and late.json()["error"]["code"] == "stopping"
            rest = [line async for line in lines]
        answer = json.loads(rest[rest.index("event: answer") + 1].removeprefix("data: "))
        assert np.shape(answer["pictures"]) == (16, 4)


def test_who_leaves_early_has_sent_the_whole_request_half_of_the_time():
    received, ended = [], []

    async def read(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        received.append(b"")
        place = len(received) - 1
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**16):
                received[place] += data
        writer.close()
        ended.append(place)

    async def scenario():
        rng = np.random.default_rng(0)
        async with await asyncio.start_server(read, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await asyncio.gather(*(load_test.leaves_early(port, [b"x" * 1000], rng) for _ in range(40)))
            while len(ended) < 40:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))
    assert 10 < [len(body) for body in received].count(1000) < 30


@pytest.mark.slow
def test_a_crowd_of_good_and_bad_clients_loses_nothing():
    command = [sys.executable, "scripts/load_test.py", "--seconds=5", "--clients=8", "--max_batch=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5 * SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["lost"] == 0 and figures["requests"]["valid"] > 0
    assert "Traceback" not in done.stderr
