"""Stop signals while native code runs, which keeps Python from calling their handlers."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import hashlib, sys
from EasyLM import flags
from EasyLM.training import StopSignals, stop_signal
stop_signal._STUCK_SECONDS = 0.5
@StopSignals()
def main(config):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)  # minutes of native code, like a compilation
flags.run(main, {})
"""


@pytest.mark.slow
def test_ctrl_c_is_answered_during_native_code():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1)  # until the native code runs
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline() == "stopping after the compilation in progress; Ctrl-C exits at once\n"
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        assert process.communicate(timeout=30)[1] == "\ninterrupted\n"
        assert process.returncode == 130 and time.monotonic() - begin < 10
    finally:
        process.kill()
