"""scripts/load_test.py reports no lost responses; `leave_early` sends about half of its requests completely."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys

import load_test_clients
import numpy as np
import pytest
from serve_kit import SECONDS


def test_half_of_the_clients_that_leave_early_send_the_whole_request():
    received: list[bytes] = []
    ended = []

    async def read(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        received.append(b"")
        index = len(received) - 1
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**16):
                received[index] += data
        writer.close()
        ended.append(index)

    async def scenario():
        rng = np.random.default_rng(0)
        async with await asyncio.start_server(read, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await asyncio.gather(*(load_test_clients.leave_early(port, [b"x" * 1000], rng) for _ in range(40)))
            while len(ended) < 40:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))
    assert 10 < [len(body) for body in received].count(1000) < 30


@pytest.mark.slow
def test_valid_and_hostile_clients_together_lose_no_response():
    command = [sys.executable, "scripts/load_test.py", "--seconds=5", "--clients=8", "--max_batch=2"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=5 * SECONDS, check=False)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert report["lost"] == 0 and report["requests"]["valid"] > 0
    assert "Traceback" not in ended.stderr
