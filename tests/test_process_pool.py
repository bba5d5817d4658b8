"""Worker processes: order, errors, death of a worker, and no import of the main module."""

import os
import pathlib
import platform
import signal
import subprocess
import sys
import time

import pytest
from worker_functions import die_once, kept_megabytes

from EasyLM.errors import UserError
from EasyLM.process_pool import Workers, available_cores, result

SUPPORT = pathlib.Path(__file__).parent / "support"
ROOT = pathlib.Path(__file__).parent.parent
# A user's script without a main guard, which imports JAX.
SCRIPT = """
import jax
print("main module runs", flush=True)
from EasyLM.process_pool import Workers
from worker_functions import main_and_jax
with Workers(2) as workers:
    print(workers.submit(main_and_jax).result(), *workers.map(pow, [2, 3], [2, 2]))
    print("sys.modules restored:", hasattr(__import__("__main__"), "Workers"))
"""
WAITING_SCRIPT = """
import os, sys, time
from EasyLM.process_pool import Workers
with Workers(2) as workers:
    print(workers.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


def start(script: str, **settings) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(SUPPORT)])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment, **settings)


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("EasyLM.data.line_index", {"jax", "fsspec", "asyncio"}),
        ("EasyLM.data.token_store", {"jax", "fsspec", "asyncio"}),
        ("tokenizer.builders.image_ref", {"jax", "fsspec", "asyncio", "ml_collections", "EasyLM.data"}),
    ],
)
def test_the_modules_of_worker_functions_import_little(module, unneeded):
    script = f"import sys, {module}; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert module in output.split() and not unneeded & set(output.split())


def test_one_process_runs_in_this_process():
    with Workers(1) as workers:
        assert list(workers.map(pow, [2, 3], [3, 2])) == [8, 9]
        assert workers.submit(os.getpid).result() == os.getpid()
        with pytest.raises(ZeroDivisionError):
            result(workers.submit(divmod, 1, 0), "a.png")


@pytest.mark.slow  # processes start
def test_results_are_in_order_and_errors_are_raised():
    with Workers(2) as workers:
        assert list(workers.map(pow, range(20), [2] * 20, chunksize=3)) == [number**2 for number in range(20)]
        assert workers.submit(os.getpid).result() != os.getpid()
        with pytest.raises(ZeroDivisionError):
            result(workers.submit(divmod, 1, 0), "a.png")


@pytest.mark.slow
def test_functions_lost_with_a_worker_run_again(tmp_path):
    with Workers(2) as workers:
        futures = [workers.submit(die_once, str(tmp_path / "flag")), *(workers.submit(abs, -n) for n in range(5))]
        assert [result(future, "a.png") for future in futures] == ["second run", *range(5)]
        with pytest.raises(UserError, match=r"^a.png: the process that read it died \("):
            result(workers.submit(os._exit, 1), "a.png")
        assert workers.submit(abs, -1).result() == 1


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide themselves")
def test_workers_keep_freed_memory_for_the_next_results():
    with Workers(2) as workers:
        assert workers.submit(kept_megabytes, 25).result() > 90


def test_workers_do_not_import_the_main_module(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    output, _ = start(str(script)).communicate(timeout=120)
    assert output.splitlines() == ["main module runs", "(None, False) 4 9", "sys.modules restored: True"]


@pytest.mark.slow
def test_workers_exit_when_the_parent_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WAITING_SCRIPT)
    with start(str(script)) as parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 60
    while pathlib.Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        if "zombie" in pathlib.Path(f"/proc/{worker}/status").read_text():
            break
        time.sleep(0.05)
    else:
        assert not pathlib.Path(f"/proc/{worker}").exists()


def test_the_cores_are_those_of_the_process_not_of_the_machine():
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, cores)
    assert available_cores() == len(cores)
