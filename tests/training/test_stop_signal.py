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
import contextlib, hashlib, sys
import jax
from EasyLM import flags
from EasyLM.training import StopSignals, stop_signal

def unrolled(x):
    for i in range(100):
        x = jax.numpy.sin(x @ x + i)
        x = x / jax.numpy.sum(x * i)
    return x

traced = jax.jit(unrolled).lower(jax.ShapeDtypeStruct((64, 64), "float32"))
stop_signal._STUCK_SECONDS = 0.5
def main(config):
    with STOP_SIGNALS:
        print("ready", flush=True)
        NATIVE_CODE  # many seconds
flags.run(main, {}, ["program"])
"""
HASHES = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)'
COMPILATION = "traced.compile()"


def start_native_code(stop_signals: str, native_code: str) -> subprocess.Popen:
    """Starts a command, and returns when it runs native code."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", PROGRAM.replace("STOP_SIGNALS", stop_signals).replace("NATIVE_CODE", native_code)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    "native_code, answer",
    [
        (HASHES, "stopping after the compilation in progress; Ctrl-C exits at once\n"),
        (COMPILATION, "SIGINT: stopping after the step in progress\n"),  # Python waits for a thread that compiles
    ],
    ids=["hashes", "compilation"],
)
def test_ctrl_c_is_answered_during_native_code(native_code, answer):
    """The trainer's commands, which stop after the compilation, and at once after a second Ctrl-C."""
    process = start_native_code("StopSignals()", native_code)
    try:
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline() == answer
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        assert process.communicate(timeout=30)[1] == "\ninterrupted\n"
        assert process.returncode == 130 and time.monotonic() - begin < 10
    finally:
        process.kill()


@pytest.mark.slow
def test_ctrl_c_during_a_compilation_ends_other_commands_with_one_line():
    """The end of the interpreter would crash: XLA still compiles."""
    process = start_native_code("contextlib.nullcontext()", COMPILATION)
    try:
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=240)[1] == "\ninterrupted\n"
        assert process.returncode == 130
    finally:
        process.kill()
