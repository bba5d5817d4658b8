"""Load test of the HTTP service on this machine: `python scripts/load_test.py --seconds=120`.

Starts the service on a free port and measures requests one at a time. Then `--clients` clients send valid requests,
whose responses must equal those of the same requests sent alone, and hostile ones: bodies that are too large, images
that declare too many pixels, garbage, wrong ids. Hostile clients are slow, disconnect early or never read their
response. At the end the service is terminated. Prints latency and throughput. The exit code is 1 if a response is lost
or wrong, the service does not exit with 0, or its log has a traceback.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import numpy as np
from load_test_clients import HOSTILE, MAX_BODY_MB, READ_SECONDS, RESPONSE_SECONDS, leave_early, send, valid_body
from ml_collections import ConfigDict

from EasyLM.errors import UserError
from EasyLM.flags import Flag, run, to_dataclass
from EasyLM.storage import check_output, write_json
from evaluation.demo import FLAGS as DEMO_FLAGS
from evaluation.prompting import PROMPTER_FLAGS

FLAGS = {
    **PROMPTER_FLAGS,
    "checkpoint": DEMO_FLAGS["checkpoint"],
    "seconds": Flag(120.0, "Duration of the load.", above=0),
    "clients": Flag(32, "Clients at the same time.", least=1),
    "hostile": Flag(0.4, "Share of hostile requests.", least=0, below=1),
    "pictures": Flag(3, "Images of a prompt.", least=1),
    "max_batch": Flag(8, "--max_batch of the service.", least=1),
    "output_json": Flag("", "Write the report to this file."),
}
_NUM_PROMPTS = 16  # different valid requests
_READY_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the load.

    Attributes:
      seconds: duration of the load.
      clients: number of clients.
      hostile: share of hostile requests.
      pictures: images of a prompt.
      output_json: file of the report; empty: print only.
    """

    seconds: float
    clients: int
    hostile: float
    pictures: int
    output_json: str


def main(config: ConfigDict) -> None:
    """Runs the test and exits with its exit code."""
    if config.output_json:
        check_output(config.output_json, "output_json")
    settings = to_dataclass(Settings, config)
    names = [name for name, flag in PROMPTER_FLAGS.items() if not flag.ignored]
    options = [f"--{name}={config[name]}" for name in (*names, "max_batch")]
    options.append(f"--max_queue={-(-settings.clients // 2)}")  # some requests get 429
    options += [f"--warm_up={settings.pictures}", f"--max_body_mb={MAX_BODY_MB}", f"--read_seconds={READ_SECONDS}"]
    sys.exit(asyncio.run(run_test(settings, options)))


async def run_test(settings: Settings, service_options: list[str]) -> int:
    """Runs the test against a new service. Returns the exit code."""
    report = Report()
    bodies = [valid_body(number, settings.pictures) for number in range(_NUM_PROMPTS)]
    async with start_service(service_options) as (server, port):
        log = asyncio.create_task(copy_log(server, report))
        await wait_until_ready(server, port)
        await measure_alone(port, bodies, report)
        await measure_load(settings, port, bodies, report)
        await measure_alone(port, bodies, report)  # the service still gives the same responses
        server.send_signal(signal.SIGTERM)
        report.exit_code = await asyncio.wait_for(server.wait(), RESPONSE_SECONDS)
        await log
    return report.finish(settings)


@contextlib.asynccontextmanager
async def start_service(options: list[str]) -> AsyncIterator[tuple[Process, int]]:
    """Starts the service as a process. Yields it and its port; kills it at the end."""
    with socket.socket() as reserved:  # SO_REUSEADDR: the service may listen on the port too
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        command = [sys.executable, "-m", "EasyLM.models.llama.llama_serve", f"--port={port}", *options]
        server = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        try:
            yield server, port
        finally:
            if server.returncode is None:
                server.kill()
                await server.wait()


async def copy_log(server: Process, report: "Report") -> None:
    """Copies the service's log to standard error and counts its tracebacks."""
    assert server.stderr
    while line := await server.stderr.readline():
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
        report.num_tracebacks += b"Traceback" in line


class Report:
    """Responses, latencies and failures."""

    def __init__(self) -> None:
        self.expected: dict[int, list] = {}  # tokens of each valid request when it was sent alone
        self.alone_seconds: list[float] = []  # latencies of requests sent alone
        self.load_latencies: list[float] = []  # latencies of valid requests under load
        self.batches: list[int] = []  # batch sizes under load
        self.load_seconds = 1e-9  # until the last valid response
        self.counts: collections.Counter = collections.Counter()  # requests by kind
        self.failures: list[str] = []
        self.exit_code: int | None = None
        self.num_tracebacks = 0

    def finish(self, settings: Settings) -> int:
        """Prints the report and returns the exit code."""
        if not self.load_latencies:
            self.failures.append("no valid request got a response")
        if self.exit_code != 0:
            self.failures.append(f"the service exited with code {self.exit_code}")
        if self.num_tracebacks:
            self.failures.append(f"the service's log has {self.num_tracebacks} tracebacks")
        rate, alone_rate = len(self.load_latencies) / self.load_seconds, 1 / np.mean(self.alone_seconds)
        quantiles = np.quantile(self.load_latencies or [0], (0.5, 0.95, 1.0))
        metrics = {
            "seconds": round(self.load_seconds, 1),
            "clients": settings.clients,
            "requests": dict(sorted(self.counts.items())),
            "lost": len(self.failures),
            "tracebacks": self.num_tracebacks,
            "latency_seconds": dict(zip(("median", "p95", "max"), map(float, quantiles.round(3)), strict=True)),
            "requests_per_second": round(rate, 2),
            "one_at_a_time_per_second": round(alone_rate, 2),
            "ratio": round(rate / alone_rate, 2),
            "mean_batch": round(float(np.mean(self.batches or [0])), 2),
        }
        print(json.dumps(metrics, indent=2))
        for failure in self.failures[:10]:
            print(f"lost: {failure}", file=sys.stderr)
        if settings.output_json:
            write_json(settings.output_json, metrics)
        return 1 if self.failures else 0


async def wait_until_ready(server: Process, port: int) -> None:
    """Waits until the service has compiled its programs.

    Raises:
      UserError: if it exits or takes too long.
    """
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline and server.returncode is None:
        with contextlib.suppress(ConnectionError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            response = await reader.read()
            writer.close()
            if response.startswith(b"HTTP/1.1 200"):
                return
        await asyncio.sleep(0.2)
    raise UserError("the service did not become ready")


async def measure_alone(port: int, bodies: list[bytes], report: Report) -> None:
    """Sends each valid request alone. Runs before and after the load, so that other load affects both."""
    for number, body in enumerate(bodies):
        begin = time.perf_counter()
        status, _, response = await send(port, body)
        report.alone_seconds.append(time.perf_counter() - begin)
        tokens = json.loads(response)["tokens"] if status == 200 else None
        if tokens is None or tokens != report.expected.get(number, tokens):
            report.failures.append(f"alone: {status} {response[:200]!r}")
        else:
            report.expected[number] = tokens


async def measure_load(settings: Settings, port: int, bodies: list[bytes], report: Report) -> None:
    """Runs all clients for `settings.seconds`. Each waits for its response before its next request."""
    begin = time.perf_counter()

    async def client(number: int) -> None:
        rng = np.random.default_rng(number)
        hostile: dict[str, Callable[[int], Awaitable[None]]]
        hostile = {**HOSTILE, "leaves early": partial(leave_early, bodies=bodies, rng=rng)}
        while time.perf_counter() - begin < settings.seconds:
            kind = "valid" if rng.random() >= settings.hostile else str(rng.choice(list(hostile)))
            report.counts[kind] += 1
            try:
                if kind == "valid":
                    await send_valid(port, int(rng.integers(len(bodies))), bodies, report)
                    report.load_seconds = time.perf_counter() - begin
                else:
                    await hostile[kind](port)
            except (OSError, TimeoutError, IndexError, ValueError, AssertionError) as error:
                report.failures.append(f"{kind}: {error!r}")

    await asyncio.gather(*(client(number) for number in range(settings.clients)))


async def send_valid(port: int, number: int, bodies: list[bytes], report: Report) -> None:
    """Sends a valid request, repeats it after status 429, and compares its response with that of the request alone."""
    begin = time.perf_counter()
    while True:
        status, header, response = await send(port, bodies[number])
        if status != 429:
            break
        report.counts["refused for now"] += 1
        await asyncio.sleep(float(header.partition("retry-after: ")[2].split()[0]))
    assert status == 200, f"{status} {response[:200]!r}"
    body = json.loads(response)
    assert body["tokens"] == report.expected.get(number), "the response differs from that of the request alone"
    report.load_latencies.append(time.perf_counter() - begin)
    report.batches.append(body["batch"])


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
