"""Clients that are slow, disconnect early or do not read: the service drops them."""

import asyncio
import contextlib
import json

import pytest
from serve_kit import (
    JSON_HEADER,
    LIMITS,
    SECONDS,
    HeldPrompter,
    ask,
    assert_error,
    base64_of,
    exchange,
    png,
    serve_while,
    tiny_engine,
)

from evaluation.serving import Limits
from evaluation.serving.app import make_app
from evaluation.serving.limits import Guard

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/generate",
    "headers": [(b"content-type", b"application/json")],
    "query_string": b"",
}
REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


def body_message(output: str) -> dict:
    body = json.dumps({"pictures": base64_of(png(1)), "output": output}).encode()
    return {"type": "http.request", "body": body, "more_body": False}


def run_asgi(app, messages, before_disconnect=lambda: None) -> list[dict]:
    """Runs an application for a client that sends these messages and disconnects. Returns what it sends."""
    sent, unsent = [], list(messages)

    async def receive():
        if unsent:
            return unsent.pop(0)
        await asyncio.to_thread(before_disconnect)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(SCOPE, receive, send), SECONDS))
    return sent


def test_slow_bodies_and_excess_connections_are_refused(engine):
    async def never():
        yield b"{"
        await asyncio.sleep(SECONDS)

    app = make_app(engine, Limits(read_seconds=0.05, connections=1))
    options = {"content": never(), "headers": JSON_HEADER}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.serving.limits._DRAIN_SECONDS", 0.05)
        slow, excess = ask(app, ("POST", "/generate", options), ("GET", "/ready", {}))
    assert_error(slow, 408, "too_slow", "0.05 seconds")
    assert_error(excess, 503, "busy")
    assert excess.headers["retry-after"] == "1"
    assert ask(app, ("GET", "/ready", {}))[0].json()["state"] == "warming up"  # earlier requests no longer count


@pytest.mark.parametrize("output", ["json", "stream"])
def test_a_disconnect_cancels_the_computation(output):
    prompter = HeldPrompter()
    engine = tiny_engine(prompter)
    run_asgi(make_app(engine, LIMITS), [body_message(output)], lambda: prompter.begun.wait(SECONDS))
    assert engine.close(SECONDS)  # without a release: the batch has stopped itself


def test_a_disconnect_within_the_body_has_status_499(app):
    sent = run_asgi(app, [{"type": "http.request", "body": b"{", "more_body": True}])
    assert sent[0]["status"] == 499


def test_a_client_that_does_not_read_its_answer_is_dropped():
    prompter = HeldPrompter()
    engine = tiny_engine(prompter)
    app = make_app(engine, Limits(read_seconds=0.3, connections=1))
    messages, sent = [body_message("stream")], []

    async def receive():
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)
        if message["type"] == "http.response.body":  # the buffers are full
            await asyncio.Event().wait()

    asyncio.run(asyncio.wait_for(app(SCOPE, receive, send), SECONDS))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert engine.close(SECONDS)  # without a release: the batch has stopped itself
    assert ask(app, ("GET", "/ready", {}))[0].json()["state"] == "stopping"  # earlier requests no longer count


def test_receive_during_a_response_waits_for_the_disconnect():
    """Starlette's file responses call `receive` while they send: `send` may read the end of the body first."""
    messages = [{"type": "http.request", "body": b"", "more_body": False}]
    received, calls = [], []

    async def app(scope, receive, send):
        receiving = asyncio.create_task(receive())
        while not calls:
            await asyncio.sleep(0)  # until `receive` has been called
        await send({"type": "http.response.start", "status": 200, "headers": []})
        received.append(await receiving)

    async def receive():
        calls.append(None)
        if len(calls) == 1:
            await asyncio.Event().wait()  # the call of `receiving`
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message):
        pass

    asyncio.run(asyncio.wait_for(Guard(app, Limits(read_seconds=0.5))(SCOPE, receive, send), SECONDS))
    assert received == [{"type": "http.disconnect"}]


@pytest.mark.slow
def test_connections_without_a_complete_header_are_dropped():
    limits = Limits(read_seconds=2)

    async def app(scope, receive, send):
        await asyncio.sleep(5)  # longer than the timeout: a client may wait for its answer
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"done"})

    async def scenario(port, server):
        clients = (b"",), (REQUEST[:9],), (REQUEST,), (REQUEST[:9], REQUEST[9:], 0.2), (REQUEST + REQUEST[:9],)
        return await asyncio.gather(*(exchange(port, *client) for client in clients))

    answers = asyncio.run(asyncio.wait_for(serve_while(app, limits, scenario), SECONDS))
    assert [answer.count(b"done") for answer in answers] == [0, 0, 1, 1, 1]


def test_connections_are_counted_before_their_first_byte():
    async def scenario(port, server):
        clients = [asyncio.create_task(exchange(port, b"")) for _ in range(3)]
        dropped, held = await asyncio.wait(clients, return_when=asyncio.FIRST_COMPLETED)
        for client in held:
            client.cancel()
        return [await client for client in dropped]

    limits = Limits(connections=1)  # two connections are held
    assert asyncio.run(asyncio.wait_for(serve_while(None, limits, scenario), SECONDS)) == [b""]


def test_a_connection_is_closed_if_its_response_is_not_read():
    size = 2 * 10**7  # larger than all socket buffers
    answering = asyncio.Event()

    async def app(scope, receive, send):
        answering.set()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": bytes(size)})

    async def scenario(port, server):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1000)
        writer.write(REQUEST)
        await answering.wait()
        while server.server_state.connections:
            await asyncio.sleep(0.01)
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            return len(await reader.read())
        return 0

    num_read = asyncio.run(asyncio.wait_for(serve_while(app, Limits(read_seconds=0.3), scenario), SECONDS))
    assert num_read < size
