"""A service with a full queue, during shutdown, and with a taken port: it finishes only accepted requests."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import numpy as np
import pytest
from serve_kit import LIMITS, SECONDS, TOKENS, HeldPrompter, assert_error, form, png, tiny_engine, wait_until

from evaluation.page import handlers
from evaluation.prompting import GenerationSettings
from evaluation.serving import Prompt
from evaluation.serving.app import make_app
from evaluation.serving.server import ServerSettings, run_server

SERVE = [sys.executable, "-m", "EasyLM.models.llama.llama_serve", "--checkpoint=evaluation/demo_model"]


def client_of(app) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def test_a_full_queue_and_a_stopping_service_refuse_requests():
    prompter = HeldPrompter()
    engine = tiny_engine(prompter, max_batch=1, max_queue=1)

    async def scenario():
        async with client_of(make_app(engine, LIMITS)) as client:
            running = asyncio.create_task(client.post("/generate", **form(png(1))))
            await asyncio.to_thread(prompter.begun.wait, SECONDS)
            both = [asyncio.create_task(client.post("/generate", **form(png(1)))) for _ in range(2)]
            refused, waiting = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            closing = asyncio.create_task(asyncio.to_thread(engine.close, SECONDS))
            while engine.state != "stopping":
                await asyncio.sleep(0.001)
            stopping, ready = await client.post("/generate", **form(png(1))), await client.get("/ready")
            prompter.release.set()
            return await refused.pop(), stopping, ready, await running, await waiting.pop(), await closing

    full, stopping, ready, ran, waited, closed = asyncio.run(asyncio.wait_for(scenario(), SECONDS))
    assert_error(full, 429, "queue_full", "try again in")
    assert int(full.headers["retry-after"]) >= 1
    assert_error(stopping, 503, "stopping")
    assert ready.status_code == 503 and ready.json()["state"] == "stopping"
    assert ran.status_code == waited.status_code == 200 and closed


def test_unfinished_requests_are_refused_when_the_service_stops():
    prompter = HeldPrompter()
    engine = tiny_engine(prompter, max_batch=1)

    async def scenario():
        async with client_of(make_app(engine, LIMITS)) as client:
            requests = [form(png(1)), form(png(1), output="stream"), form(png(1))]
            waiting = [asyncio.create_task(client.post("/generate", **options)) for options in requests]
            await asyncio.to_thread(prompter.begun.wait, SECONDS)
            while engine.num_waiting < 2:
                await asyncio.sleep(0.001)
            assert not await asyncio.to_thread(engine.close, 0.01)
            return await asyncio.gather(*waiting)

    first, stream, last = asyncio.run(asyncio.wait_for(scenario(), SECONDS))
    for answer in (first, last):
        assert_error(answer, 503, "stopping", "before this request is finished")
    assert 'event: error\ndata: {"error": {"code": "stopping"' in stream.text
    assert engine.close(SECONDS)  # the running batch stops itself


def test_warming_up_ends_early_when_the_service_stops():
    prompter = HeldPrompter()
    engine = tiny_engine(prompter, warm_up="1,2", max_batch=2)
    future = engine.warm_up(GenerationSettings())
    assert prompter.begun.wait(SECONDS)
    closing = engine.close(0.01)  # cancels the warm-up while its first batch runs
    prompter.release.set()
    assert not closing and engine.close(SECONDS) and future.cancelled()
    assert prompter.batches == [1]


def test_a_failed_warm_up_is_reported(caplog):
    engine = tiny_engine(HeldPrompter(failing=True), warm_up="1")
    assert handlers.first_status(engine).startswith("Compiling")
    assert engine.warm_up(GenerationSettings()).exception(SECONDS)
    wait_until(lambda: engine.state != "warming up")
    assert handlers.first_status(engine).startswith("Warming up failed (RuntimeError: the device is on fire)")
    assert engine.state == "failed" and engine.close(SECONDS)
    assert engine.state == "stopping" and "warming up failed" in caplog.text and "on fire" in caplog.text


@pytest.mark.parametrize("signals, code", [(1, 0), (2, 1)])
def test_the_exit_code_is_1_if_requests_were_cancelled(monkeypatch, signals, code):
    prompter = HeldPrompter()
    engine = tiny_engine(prompter)

    def run(server):
        engine.generate(Prompt(tokens=np.zeros((1, TOKENS), np.int32)), GenerationSettings(), lambda preview: None)
        assert prompter.begun.wait(SECONDS)
        for _ in range(signals):
            server.handle_exit(signal.SIGTERM, None)
        if signals == 1:
            prompter.release.set()
            wait_until(lambda: server.should_exit)

    monkeypatch.setattr("uvicorn.Server.run", run)
    settings = ServerSettings(host="127.0.0.1", port=0, token="", stop_seconds=SECONDS)
    assert run_server(engine, LIMITS, settings) == code
    prompter.release.set()
    assert engine.close(SECONDS)


@pytest.mark.slow
def test_sigterm_finishes_accepted_requests_and_exits_with_0(port):
    command = [*SERVE, f"--port={port}", "--warm_up=1", "--max_batch=1", "--token=$SERVICE_TOKEN"]
    environment = os.environ | {"SERVICE_TOKEN": "sesame"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        asyncio.run(asyncio.wait_for(stop_during_a_stream(server, f"http://127.0.0.1:{port}"), 3 * SECONDS))
        output, _ = server.communicate(timeout=SECONDS)
        assert server.returncode == 0, output
        assert "Traceback" not in output
    finally:
        server.kill()


async def stop_during_a_stream(server: subprocess.Popen, url: str) -> None:
    """Terminates the server after the first preview of a stream; the answer still arrives."""
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
                assert line in (": waiting", "")  # while it compiles
            server.send_signal(signal.SIGTERM)
            while (await client.get("/ready")).json()["state"] != "stopping":
                await asyncio.sleep(0.01)
            late = await client.post("/generate", **form(png(1)))
            assert late.status_code == 503 and late.json()["error"]["code"] == "stopping"
            rest = [line async for line in lines]
        answer = json.loads(rest[rest.index("event: answer") + 1].removeprefix("data: "))
        assert np.shape(answer["pictures"]) == (16, 4)


@pytest.mark.slow
@pytest.mark.parametrize("is_idle, printed", [(True, "last words\nshutdown\n"), (False, "last words\n")])
def test_beside_a_running_batch_the_interpreter_does_not_shut_down(is_idle, printed):
    """Its threads would abort the process when they return from native code."""
    program = "import atexit; from evaluation.serving import exit_process; atexit.register(print, 'shutdown'); "
    program += f"print('last words'); exit_process(3, {is_idle})"
    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (3, printed)


@pytest.mark.slow
def test_a_port_in_use_exits_with_1():
    with socket.create_server(("127.0.0.1", 0)) as owner:
        command = [*SERVE, f"--port={owner.getsockname()[1]}"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "address already in use" in ended.stderr and "Fatal" not in ended.stderr
