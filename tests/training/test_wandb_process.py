"""wandb's process that is killed or hangs, and its server that hangs: the run continues and ends."""

import concurrent.futures
import http.server
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import pytest

pytestmark = pytest.mark.slow
PROGRAM = """
import os, subprocess, sys, time, urllib.request
from EasyLM import flags
from EasyLM.training import metrics_log, metrics_sinks

run_dir, fault = sys.argv[1:]
metrics_log.CLOSE_SECONDS, metrics_sinks._FINISH_SECONDS = 10, 2
config = flags.defaults(metrics_log.LOGGER_FLAGS)
config.online = fault.startswith("http")
logger = metrics_log.Logger(config, run_dir, {})
logger.log({"step": 0, "loss": 1.0})
children = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
(core,) = (int(line.split()[0]) for line in children.splitlines() if "wandb" in line)
print("core", core, flush=True)
time.sleep(0.5)
urllib.request.urlopen(fault) if config.online else os.kill(core, int(fault))
time.sleep(0.5)
for step in (1, 2, 3):
    logger.log({"step": step, "loss": 1.0})
deadline = time.monotonic() + 60
while any(delivery._waiting for delivery in logger._deliveries) and time.monotonic() < deadline:
    time.sleep(0.1)
logger.close()
"""
KILL, STOP = str(int(signal.SIGKILL)), str(int(signal.SIGSTOP))


def log_with_a_fault(directory: pathlib.Path, fault: str, **environment: str) -> tuple[pathlib.Path, str]:
    """Logs steps 0 to 3 with wandb in a process of its own, with a fault after step 0.

    Returns the run directory and the output of the process.
    """
    environment |= {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    run_dir = directory / "run"
    command = [sys.executable, "-c", PROGRAM, str(run_dir), fault]
    with open(directory / "output", "w") as file:  # not a pipe, which wandb's process could keep open
        try:
            code = subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=120).returncode
        finally:
            output = (directory / "output").read_text()
            if fault == STOP and (core := re.search(r"core (\d+)", output)):
                os.kill(int(core[1]), signal.SIGKILL)  # it would remain, stopped
    assert code == 0 and "Traceback" not in output, output
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    return run_dir, output


class WandbServer(http.server.BaseHTTPRequestHandler):
    """What wandb needs to begin a run. It never answers again after the path /hang."""

    hangs = False

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if WandbServer.hangs:
            threading.Event().wait()
        project = {"id": "p", "name": "lvm", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": "run", "displayName": "run", "project": project}
        files = {"runID": "b", "uploadHeaders": [], "files": []}
        data = {"upsertBucket": {"bucket": bucket, "inserted": True}, "model": None, "createRunFiles": files}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": data}).encode())

    def do_GET(self):
        WandbServer.hangs = self.path == "/hang"
        self.do_POST() if not WandbServer.hangs else self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def wandb_runs(tmp_path_factory):
    """Futures of a run whose wandb process is killed, of one where it is stopped, of one whose server hangs."""
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), WandbServer) as server,
        concurrent.futures.ThreadPoolExecutor(3) as pool,  # they mostly wait
    ):
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        faults = {"killed": KILL, "stopped": STOP, "server": f"{url}/hang"}
        environment = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}
        yield {
            name: pool.submit(log_with_a_fault, tmp_path_factory.mktemp(name), fault, **environment)
            for name, fault in faults.items()
        }
        server.shutdown()


def test_wandb_is_started_again_after_its_process_was_killed(wandb_runs):
    run_dir, output = wandb_runs["killed"].result()
    assert "wandb cannot be written; the run continues, and tries again: " in output
    assert "wandb can be written again; no step is missing" in output
    assert len(list(run_dir.rglob("*.wandb"))) == 2, "one file of each of wandb's processes"


def test_a_process_of_wandb_that_hangs_does_not_keep_the_run_from_exiting(wandb_runs):
    _, output = wandb_runs["stopped"].result()
    assert "wandb did not close within 30 s; the run ends without it" in output


def test_a_server_of_wandb_that_stops_to_answer_delays_neither_steps_nor_the_end(wandb_runs):
    _, output = wandb_runs["server"].result()
    assert "`wandb sync` uploads the rest from" in output and "ends without it" not in output
