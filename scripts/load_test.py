"""Many clients at once, good and bad ones: `python scripts/load_test.py --seconds=120`, on loopback.

Starts the service on a free port, measures requests one at a time, then lets `--clients` clients send valid requests
(each answer is compared with what the same request got alone), mixed with hostile ones: bodies too large, pictures that
promise too many pixels, garbage, wrong ids, senders that are slow, leave early or never read their answer. At the end
it tells the service to stop. Prints latencies and throughput; exits with code 1 if an answer was lost or wrong, the
service ended badly, or its log has a traceback.
"""

import asyncio
import base64
import collections
import contextlib
import json
import os
import signal
import socket
import struct
import sys
import time
import zlib
from functools import partial

import numpy as np

from EasyLM.errors import UserError
from EasyLM.flags import Flag, run
from EasyLM.storage import check_output
from evaluation.demo import FLAGS as DEMO_FLAGS
from evaluation.prompting.prompter import PROMPTER_FLAGS
from tokenizer.media import images
from tokenizer.synthetic import scenes

FLAGS = {
    **PROMPTER_FLAGS,
    "checkpoint": DEMO_FLAGS["checkpoint"],
    "seconds": Flag(120.0, "How long the clients come."),
    "clients": Flag(32, "Clients at the same time."),
    "hostile": Flag(0.4, "Share of their requests that are hostile."),
    "pictures": Flag(3, "Pictures of a prompt."),
    "max_batch": Flag(8, "The service's."),
    "output_json": Flag("", "Write the figures to this file."),
}
PROMPTS = 16  # different valid requests
BODY_MB = 1  # the service's limit here, so that a body too large is quickly sent
READ_SECONDS = 3.0  # likewise for a slow one
READY_SECONDS, ANSWER_SECONDS = 300, 120


def main(config) -> None:
    """Runs the test; see above."""
    if config.clients < 1 or not config.seconds > 0 or not 0 <= config.hostile < 1:
        raise UserError("--clients must be at least 1, --seconds above 0, --hostile from 0 to below 1")
    if config.output_json:
        check_output(config.output_json, "output_json")
    sys.exit(asyncio.run(test(config)))


async def test(config) -> int:
    """The exit code."""
    report = Report(config)
    async with service(config) as (server, port):
        watching = asyncio.create_task(watch(server.stderr, report))
        await ready(server, port)
        await alone(config, port, report)
        await crowd(config, port, report)
        await alone(config, port, report)  # after all that, requests are answered as before
        server.send_signal(signal.SIGTERM)
        report.exit_code = await asyncio.wait_for(server.wait(), ANSWER_SECONDS)
        await watching
    return report.end()


@contextlib.asynccontextmanager
async def service(config):
    """The service as a process of its own, and its port; it does not outlive this one's end."""
    held = socket.socket()  # the port, so that nobody else is given it; who sets this option too may listen on it
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]
    command = [sys.executable, "-m", "EasyLM.models.llama.llama_serve", f"--port={port}"]
    command += [f"--{name}={config[name]}" for name in (*PROMPTER_FLAGS, "max_batch")]
    command += [f"--max_queue={-(-config.clients // 2)}"]  # so that some are told to come again
    command += [f"--warm_up={config.pictures}", f"--max_body_mb={BODY_MB}", f"--read_seconds={READ_SECONDS}"]
    server = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield server, port
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()
        held.close()


async def watch(log: asyncio.StreamReader, report: "Report") -> None:
    """Passes the service's log on, and counts its tracebacks."""
    while line := await log.readline():
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
        report.tracebacks += b"Traceback" in line


class Report:
    """What happened."""

    def __init__(self, config):
        self.config = config
        self.expected: dict[int, list] = {}  # of each valid request its answer when it came alone
        self.alone_seconds: list[float] = []  # that these took
        self.seconds: list[float] = []  # that valid requests took in the crowd
        self.batches: list[int] = []
        self.crowd_seconds = 1e-9  # until the last valid answer
        self.counts = collections.Counter()
        self.lost: list[str] = []
        self.exit_code = None
        self.tracebacks = 0  # in the service's log

    def end(self) -> int:
        """Prints the figures; the exit code."""
        if not self.seconds:
            self.lost.append("no valid request was answered")
        if self.exit_code != 0:
            self.lost.append(f"the service ended with code {self.exit_code}")
        if self.tracebacks:
            self.lost.append(f"the service's log has {self.tracebacks} tracebacks")
        rate, alone_rate = len(self.seconds) / self.crowd_seconds, 1 / np.mean(self.alone_seconds)
        quantiles = np.quantile(self.seconds or [0], (0.5, 0.95, 1.0))
        figures = {
            "seconds": round(self.crowd_seconds, 1),
            "clients": self.config.clients,
            "requests": dict(sorted(self.counts.items())),
            "lost": len(self.lost),
            "tracebacks": self.tracebacks,
            "latency_seconds": dict(zip(("median", "p95", "max"), map(float, quantiles.round(3)), strict=True)),
            "requests_per_second": round(rate, 2),
            "one_at_a_time_per_second": round(alone_rate, 2),
            "ratio": round(rate / alone_rate, 2),
            "mean_batch": round(float(np.mean(self.batches or [0])), 2),
        }
        print(json.dumps(figures, indent=2))
        for reason in self.lost[:10]:
            print(f"lost: {reason}", file=sys.stderr)
        if self.config.output_json:
            with open(self.config.output_json, "w", encoding="utf-8") as file:
                json.dump(figures, file, indent=2)
        return 1 if self.lost else 0


async def send(port: int, body: bytes, path: str = "/generate", claimed: int | None = None, pause: float = 0.0):
    """One request on a connection of its own -> status, headers' text, body. `pause`: seconds between bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answering = asyncio.ensure_future(reader.read())  # at once: the service may answer before the body's end
    try:
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {claimed or len(body)}\r\n\r\n".encode())
        for part in [body[i : i + 1] for i in range(len(body))] if pause else [body]:
            writer.write(part)
            await writer.drain()
            if pause:
                await asyncio.wait({answering}, timeout=pause)
            if answering.done():
                break
        answer = await asyncio.wait_for(answering, ANSWER_SECONDS)
    finally:
        answering.cancel()
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(maxsplit=2)[1]), head.decode().lower(), body


async def ready(server, port: int) -> None:
    """Waits until the service is warm."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and server.returncode is None:
        with contextlib.suppress(ConnectionError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
            if answer.startswith(b"HTTP/1.1 200"):
                return
        await asyncio.sleep(0.2)
    raise UserError("the service did not become ready")


def valid(number: int, pictures: int) -> bytes:
    """A prompt of frames of a scene; its seed is its number."""
    frames = [one["image"] for one in scenes.clip(number, 64, pictures)]
    return json.dumps(
        {"pictures": [base64.b64encode(images.png_bytes(frame)).decode() for frame in frames], "seed": number}
    ).encode()


async def alone(config, port: int, report: Report) -> None:
    """Each valid request by itself, one after the other: before the crowd and after it, so that both meet the rates
    of a machine that has other things to do."""
    bodies = [valid(number, config.pictures) for number in range(PROMPTS)]
    for number, body in enumerate(bodies):
        begin = time.perf_counter()
        status, _, answer = await send(port, body)
        report.alone_seconds.append(time.perf_counter() - begin)
        if status != 200 or json.loads(answer)["tokens"] != report.expected.get(number, json.loads(answer)["tokens"]):
            report.lost.append(f"alone: {status} {answer[:200]}")
        else:
            report.expected[number] = json.loads(answer)["tokens"]


async def crowd(config, port: int, report: Report) -> None:
    """All clients, until the time is over; each waits for its answer before it sends the next."""
    bodies = [valid(number, config.pictures) for number in range(PROMPTS)]
    begin = time.perf_counter()

    async def client(name: int) -> None:
        rng = np.random.default_rng(name)
        hostile = {**HOSTILE, "leaves early": partial(leaves_early, bodies=bodies, rng=rng)}
        while time.perf_counter() - begin < config.seconds:
            kind = "valid" if rng.random() >= config.hostile else str(rng.choice(list(hostile)))
            report.counts[kind] += 1
            try:
                if kind == "valid":
                    await one_valid(port, int(rng.integers(PROMPTS)), bodies, report)
                    report.crowd_seconds = time.perf_counter() - begin
                else:
                    await hostile[kind](port)
            except (OSError, TimeoutError, IndexError, ValueError, AssertionError) as error:
                report.lost.append(f"{kind}: {error!r}")

    await asyncio.gather(*(client(name) for name in range(config.clients)))


async def one_valid(port: int, number: int, bodies: list[bytes], report: Report) -> None:
    """A valid request; one that is told to come again does so."""
    begin = time.perf_counter()
    while True:
        status, head, answer = await send(port, bodies[number])
        if status != 429:
            break
        report.counts["told to come again"] += 1
        await asyncio.sleep(float(head.partition("retry-after: ")[2].split()[0]))
    assert status == 200, f"{status} {answer[:200]}"
    answer = json.loads(answer)
    assert answer["tokens"] == report.expected.get(number), "another answer than alone"
    report.seconds.append(time.perf_counter() - begin)
    report.batches.append(answer["batch"])


async def refused(port: int, expected: int, body: bytes, **options) -> None:
    status, _, answer = await send(port, body, **options)
    assert status == expected, f"{status} {answer[:200]}, not {expected}"
    assert set(json.loads(answer)["error"]) == {"code", "message"}


async def too_large(port: int) -> None:
    await refused(port, 413, b" " * (BODY_MB * 2**20 + 1))


async def bomb(port: int) -> None:
    """A PNG file of some bytes that promises 10 gigabytes of pixels."""
    file = bytearray(images.png_bytes(np.zeros((1, 1, 3), np.uint8)))
    file[16:24] = struct.pack(">II", 60_000, 60_000)
    file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    await refused(port, 413, json.dumps({"pictures": [base64.b64encode(file).decode()]}).encode(), path="/tokenize")


async def garbage(port: int) -> None:
    await refused(port, 422, os.urandom(1000))


async def no_picture(port: int) -> None:
    await refused(port, 422, json.dumps({"pictures": [base64.b64encode(os.urandom(1000)).decode()]}).encode())


async def wrong_ids(port: int) -> None:
    await refused(port, 422, json.dumps({"tokens": [[2**30] * 64] * 3}).encode())


async def slow(port: int) -> None:
    """A body that would take a minute. What it sends on after the refusal can have the connection reset before that
    is read."""
    with contextlib.suppress(ConnectionError):
        await refused(port, 408, b" " * 60, claimed=10_000, pause=1.0)


async def never_reads(port: int) -> None:
    """Takes nothing of a streamed answer that is larger than the buffers on its way: the script of `/docs`.

    Its small segments and window keep those buffers small.
    """
    with socket.socket() as small:
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        small.setblocking(False)
        await asyncio.get_running_loop().sock_connect(small, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=small, limit=1024)
        writer.write(b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(1), ANSWER_SECONDS)  # from here on the service counts
        await asyncio.sleep(3 * READ_SECONDS)
        answer += await asyncio.wait_for(reader.read(), ANSWER_SECONDS)
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head[:200]
    promised = int(head.lower().partition(b"content-length: ")[2].split()[0])
    assert len(body) < promised, "the service has waited for who never reads"


async def leaves_early(port: int, bodies: list[bytes], rng: np.random.Generator) -> None:
    """A valid request whose sender does not wait for the answer, or leaves in the middle of the body."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    body = bodies[rng.integers(len(bodies))]
    sent = len(body) if rng.random() < 0.5 else rng.integers(len(body))
    writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
    writer.write(b"content-length: %d\r\n\r\n" % len(body) + body[:sent])
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()


HOSTILE = {  # besides those who leave early, with requests that are valid
    "too large": too_large,
    "bomb": bomb,
    "garbage": garbage,
    "no picture": no_picture,
    "wrong ids": wrong_ids,
    "slow": slow,
    "never reads": never_reads,
}


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
