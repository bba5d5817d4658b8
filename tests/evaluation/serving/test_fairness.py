"""One client's requests do not hold up those of others: lanes, the order of the queue, and the bound of a client."""

import asyncio
import contextlib
import json
import threading
import time

import numpy as np
import pytest
from serve_kit import (
    LIMITS,
    SECONDS,
    TOKENS,
    HeldPrompter,
    ask,
    assert_error,
    base64_of,
    exchange,
    form,
    png,
    serve_while,
    tiny_engine,
    wait_until,
)

from evaluation.prompting import GenerationSettings
from evaluation.serving import Limits, Prompt
from evaluation.serving.app import make_app
from evaluation.serving.batcher import Batcher, QueueFullError
from evaluation.serving.workload import TooMuchWorkError, Workload


class Worker:
    """The `run` of a batcher. Items that start with "held" wait for `release`. Records items and lane of each batch."""

    def __init__(self):
        self.batches, self.release = [], threading.Event()

    def __call__(self, jobs):
        self.batches.append(([job.item for job in jobs], threading.current_thread().name.removeprefix("batcher: ")))
        if jobs[0].item.startswith("held"):
            assert self.release.wait(SECONDS)
        return [job.item for job in jobs]

    def has_begun(self, item):
        return any(item in items for items, _ in self.batches)


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.release.set()


def batcher(worker, **options):
    return Batcher(worker, **{"max_batch": 4, "max_waiting": 8, "window_seconds": 0.0, "short_cost": 4} | options)


def hold(queue, worker, item="held", **options):
    """Submits a job that keeps its lane busy, and waits until it runs."""
    future = queue.submit(item, item, **options)
    wait_until(lambda: worker.has_begun(item))
    return future


def test_cheap_jobs_do_not_wait_for_expensive_ones(worker):
    queue = batcher(worker)
    expensive = hold(queue, worker, cost=5)
    assert queue.submit("x", "cheap", cost=4).result(SECONDS) == "cheap"
    assert not expensive.done()


def test_compiled_programs_do_not_wait_for_others(worker):
    queue = batcher(worker)
    queue.submit("x", "first", program="x").result(SECONDS)
    compiling = hold(queue, worker, program="new")
    queue.submit("x", "again", program="x").result(SECONDS)
    queue.submit("x", "expensive", program="x", cost=64).result(SECONDS)
    assert not compiling.done()
    worker.release.set()
    compiling.result(SECONDS)
    queue.submit("new", "other settings", program="new").result(SECONDS)
    lanes = {items[0]: lane for items, lane in worker.batches}
    assert lanes == {
        "first": "first use",
        "held": "first use",
        "again": "short",
        "expensive": "long",
        "other settings": "short",
    }


def order_of(queue, worker, jobs):
    """Submits jobs while their lane is busy; returns the order in which they run."""
    hold(queue, worker)
    futures = [queue.submit(item, item, **options) for item, options in jobs]
    worker.release.set()
    for future in futures:
        future.result(SECONDS)
    return [items[0] for items, _ in worker.batches[1:]]


def test_a_busy_client_does_not_delay_another(worker):
    jobs = [(f"a{i}", {"client": "a"}) for i in range(4)] + [("b", {"client": "b"})]
    assert order_of(batcher(worker), worker, jobs) == ["a0", "b", "a1", "a2", "a3"]


def test_a_cheap_job_passes_expensive_ones_of_the_same_client(worker):
    jobs = [(f"large{i}", {"cost": 3}) for i in range(3)] + [("small", {})]
    # It counts as much of each as its own cost: 1 + 3 * 1 = 4 comes after the first, 3, and before the second, 6.
    assert order_of(batcher(worker), worker, jobs) == ["large0", "small", "large1", "large2"]


def test_an_expensive_job_is_not_passed_for_ever(worker):
    now = time.monotonic()
    jobs = [("large", {"cost": 4, "client": "a", "arrived": now - 5})]
    jobs += [(f"small{i}", {"client": f"b{i}", "arrived": now}) for i in range(3)]
    assert order_of(batcher(worker), worker, jobs)[0] == "large"


def test_the_cost_of_a_batch_is_bounded(worker):
    queue = batcher(worker, max_batch_cost=8)
    hold(queue, worker)
    futures = [queue.submit("x", "x", cost=3) for _ in range(4)] + [queue.submit("y", "y", cost=1) for _ in range(4)]
    worker.release.set()
    for future in futures:
        future.result(SECONDS)
    # 8 // 3 = 2
    assert sorted(items for items, _ in worker.batches[1:]) == [["x"] * 2, ["x"] * 2, ["y"] * 4]


def test_larger_batches_are_compiled_while_their_jobs_run_in_smaller_ones(worker):
    queue = batcher(worker)
    queue.submit("x", "first", program="x").result(SECONDS)
    hold(queue, worker)  # the short lane is busy
    futures = [queue.submit("x", f"x{i}", program="x") for i in range(4)]
    wait_until(lambda: queue.is_compiled("x", 4))
    assert worker.batches[2:] == [(["x0"] * 2, "first use"), (["x0"] * 4, "first use")]
    worker.release.set()
    assert [future.result(SECONDS) for future in futures] == ["x0", "x1", "x2", "x3"]
    assert worker.batches[4:] == [(["x0", "x1", "x2", "x3"], "short")]


def test_rehearsals_take_no_place_in_the_queue(worker):
    queue = batcher(worker, max_waiting=1)
    hold(queue, worker, program="new")
    rehearsals = [queue.submit(i, "rehearsal", program=i, copies=2, rehearsal=True) for i in range(3)]
    waiting = queue.submit("x", "x", program="other")
    with pytest.raises(QueueFullError):
        queue.submit("x", "x", program="other")
    worker.release.set()
    for future in [*rehearsals, waiting]:
        future.result(SECONDS)
    assert queue.is_compiled(0, 2) and not queue.is_compiled(0, 1)
    assert worker.batches.count((["rehearsal"] * 2, "first use")) == 3


def test_the_outstanding_work_of_a_client_is_bounded():
    work = Workload(most=128)
    with contextlib.ExitStack() as first, contextlib.ExitStack() as others:
        first.enter_context(work.admitted("a", 64))
        others.enter_context(work.admitted("a", 64))
        with pytest.raises(TooMuchWorkError, match="2 requests of this client are open"), work.admitted("a", 64):
            pass
        for _ in range(126):  # the large requests count as one small one each
            others.enter_context(work.admitted("a", 1))
        with pytest.raises(TooMuchWorkError), work.admitted("a", 1):
            pass
        others.enter_context(work.admitted("b", 64))
        first.close()
        others.enter_context(work.admitted("a", 1))
    with work.admitted("a", 500):  # a client without requests is always admitted
        pass
    assert not work._costs


def test_a_client_with_too_much_work_gets_429_until_its_responses_are_sent():
    prompter = HeldPrompter()
    engine = tiny_engine(prompter, max_client_pictures=8)
    app = make_app(engine, LIMITS)
    large = {"type": "http.request", "body": json.dumps({"pictures": base64_of(png(1)), "n_candidates": 4}).encode()}
    scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1)}

    async def scenario():
        unread, statuses = asyncio.Event(), []

        async def never_reads():
            messages = [large]

            async def receive():
                return messages.pop() if messages else await asyncio.Event().wait()

            async def send(message):
                statuses.append(message.get("status"))
                if message["type"] == "http.response.body":
                    await unread.wait()

            await app(dict(scope), receive, send)

        clients = [asyncio.create_task(never_reads()) for _ in range(2)]
        await asyncio.to_thread(wait_until, lambda: len(engine._workload._costs["127.0.0.1"]) == 2)
        options = form(png(1), n_candidates=4)
        early = (await asyncio.to_thread(ask, app, ("POST", "/generate", options)))[0]
        prompter.release.set()
        while len(statuses) < 4:  # both are computed; their clients do not read
            await asyncio.sleep(0.01)
        late, small = await asyncio.to_thread(
            ask, app, ("POST", "/generate", options), ("POST", "/generate", form(png(1)))
        )
        unread.set()
        await asyncio.gather(*clients)
        return early, late, small, (await asyncio.to_thread(ask, app, ("POST", "/generate", options)))[0]

    early, late, small, after = asyncio.run(asyncio.wait_for(scenario(), SECONDS))
    for answer in (early, late):
        assert_error(answer, 429, "too_much_work", "requests of this client are open", "8 images")
        assert int(answer.headers["retry-after"]) >= 1
    assert small.status_code == after.status_code == 200, small.text
    assert engine.close(SECONDS)


class HeldFramesPrompter(HeldPrompter):
    """Only requests for several images wait."""

    def generate(self, prompts, settings, **options):
        if settings.num_new_images > 1:
            super().generate(prompts, settings, **options)
        return np.zeros((len(prompts), settings.num_candidates, settings.num_new_images, TOKENS), np.int32)


def test_the_first_use_of_8_frames_holds_up_no_other_client():
    prompter = HeldFramesPrompter()
    engine = tiny_engine(prompter, max_batch=1)
    prompt = Prompt(tokens=np.zeros((1, TOKENS), np.int32))
    engine.generate(prompt, GenerationSettings(), client="a").result(SECONDS)
    frames = engine.generate(prompt, GenerationSettings(num_new_images=8), client="b")
    wait_until(prompter.begun.is_set)
    for client in ("a", "b", "c"):
        assert len(engine.generate(prompt, GenerationSettings(), client=client).result(SECONDS).images[0]) == 1
    assert not frames.done()
    prompter.release.set()
    assert len(frames.result(SECONDS).images[0]) == 8
    assert engine.close(SECONDS)


def test_settings_with_the_same_answer_share_a_program():
    engine = tiny_engine(HeldPrompter(), max_batch=1)
    prompt = Prompt(tokens=np.zeros((1, TOKENS), np.int32))
    first = engine.generate(prompt, GenerationSettings())
    wait_until(lambda: engine._prompter.batches)
    engine._prompter.release.set()
    first.result(SECONDS)
    for settings in ({"temperature": 0.0}, {"top_k": 3, "seed": 5}, {"top_p": 0.5}, {"context_images": 1000}):
        item = engine.generate(prompt, GenerationSettings(**settings))
        item.result(SECONDS)
    assert len(engine._batcher._compiled) == 1
    assert engine.close(SECONDS)


@pytest.mark.slow
def test_30_greedy_clients_do_not_starve_a_default_request():
    """Clients of 30 addresses ask for 64 images each, of settings that are not compiled, and never read."""
    engine = tiny_engine(warm_up="1", max_batch=2)
    engine.warm_up(GenerationSettings()).result(SECONDS)
    app = make_app(engine, Limits())
    default = json.dumps({"pictures": base64_of(png(1))}).encode()

    def message(body: bytes) -> bytes:
        return b"POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n" + (
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )

    async def ask_default(port):
        begin = time.monotonic()
        answer = await exchange(port, message(default))
        assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
        return time.monotonic() - begin

    async def scenario(port, server):
        await ask_default(port)
        normal = np.median([await ask_default(port) for _ in range(3)])
        writers = []
        for number in range(30):
            candidates = (8, 16, 32)[number % 3]
            fields = {"n_candidates": candidates, "n_new_frames": 64 // candidates, "output": "stream"}
            body = json.dumps({"pictures": base64_of(png(1)), "temperature": number / 30, **fields}).encode()
            _, writer = await asyncio.open_connection(
                "127.0.0.1", port, local_addr=(f"127.0.0.{2 + number}", 0), limit=1000
            )
            writer.write(message(body))
            writers.append(writer)
        while engine.num_waiting < 20:
            await asyncio.sleep(0.01)
        seconds = [await ask_default(port) for _ in range(5)]
        waiting = engine.num_waiting
        for writer in writers:
            writer.transport.abort()
        return normal, seconds, waiting

    normal, seconds, waiting = asyncio.run(asyncio.wait_for(serve_while(app, Limits(), scenario), 2 * SECONDS))
    print(f"a default request takes {normal:.2f} s alone, {max(seconds):.2f} s at most beside 30 greedy clients")
    assert waiting >= 20  # they were still waiting
    assert max(seconds) < 10 * normal + 1
    assert engine.close(SECONDS)
