"""The processes of a run end together, within 30 s, with one line that names the cause."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from tiny_run import await_metrics, start_two

from EasyLM.errors import UserError, error_line
from EasyLM.parallel import peers

PROGRAM = pathlib.Path(__file__).parents[1] / "support" / "peers_program.py"
ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 30  # from the failure to the end of the last process
KILLED = "ended without an error message; it was probably killed, for example for lack of memory"


def start(count, port, **flags) -> list[subprocess.Popen]:
    """Starts the program as `count` processes; returns when they are connected."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    flags |= {"jax_distributed.initialize_jax_distributed": True, "jax_distributed.num_processes": count}
    flags["jax_distributed.coordinator_address"] = f"127.0.0.1:{port}"
    command = [sys.executable, str(PROGRAM), *(f"--{name}={value}" for name, value in flags.items())]
    processes = [
        subprocess.Popen(
            [*command, f"--jax_distributed.process_id={index}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    for process in processes:
        assert process.stdout.readline() == "connected\n", process.communicate()[1]
    return processes


def finish(processes) -> tuple[list[int], list[str]]:
    """Returns the exit codes and what the processes printed to stderr. They must end within SECONDS."""
    end = time.monotonic() + SECONDS
    try:
        outputs = [process.communicate(timeout=max(end - time.monotonic(), 0.1))[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def errors(output) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(("error", "F", "E", "***", "Fatal", "Traceback"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "failing", "how"), [(2, 0, "UserError"), (2, 1, "KeyError"), (4, 0, "KeyError"), (4, 2, "UserError")]
)
def test_an_error_of_one_process_ends_all(port, count, failing, how):
    code, text = {"UserError": (2, "a.jsonl:3: not JSON"), "KeyError": (1, "KeyError: 'x'")}[how]
    codes, outputs = finish(start(count, port, failing=failing, how=how))
    assert codes == [code] * count
    for index, output in enumerate(outputs):
        if index != failing:
            assert errors(output) == [f"error: process {failing} on {socket.gethostname()}: {text}"]
    assert errors(outputs[failing])[0] == (f"error: {text}" if code == 2 else "Traceback (most recent call last):")
    assert "Check failure" not in outputs[failing]


@pytest.mark.slow
def test_a_process_whose_exit_hangs_ends_too(port):
    codes, outputs = finish(start(2, port, failing=1, how="slow exit"))
    assert codes == [2, 2]
    assert errors(outputs[1])[0] == "error: a.jsonl:3: not JSON"


@pytest.mark.slow
@pytest.mark.parametrize(("count", "failing"), [(2, 0), (2, 1), (4, 0), (4, 3)])
def test_a_killed_process_ends_all(port, count, failing):
    processes = start(count, port, failing=count)
    processes[failing].send_signal(signal.SIGKILL)
    codes, outputs = finish(processes)
    assert codes.pop(failing) == -signal.SIGKILL and not errors(outputs.pop(failing))
    for code, output in zip(codes, outputs, strict=True):
        assert_reports_the_kill(failing, code, output)


def assert_reports_the_kill(killed, code, output) -> None:
    """JAX aborts a process whose process 0 is gone, and sometimes is faster."""
    if killed == 0 and "another task died" in output:
        assert code in (1, -signal.SIGABRT)
    else:
        assert code == 1 and errors(output) == [f"error: process {killed} on {socket.gethostname()}: {KILLED}"]


@pytest.mark.slow
def test_a_hang_of_one_process_ends_all_with_the_stacks_of_each(port):
    codes, outputs = finish(start(2, port, failing=1, how="hang"))
    assert codes == [70, 70]
    for output in outputs:
        assert "--watchdog_minutes=0.05: step 1" in output and "has not finished within this time" in output
    assert "in fail_as" in outputs[1] and "in fail_as" not in outputs[0]  # the stack of the cause
    assert "process_allgather" in outputs[0]


@pytest.mark.slow
def test_processes_that_finish_are_no_failure(port):
    codes, outputs = finish(start(4, port))
    assert codes == [0] * 4 and not any(map(errors, outputs))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_trainer_ends_the_other(tmp_path, port, killed):
    running = start_two(tmp_path, port, mesh_dim="1,4,1", total_steps=10**6)
    await_metrics(running, tmp_path / "run" / "metrics.jsonl")
    running[killed].send_signal(signal.SIGKILL)
    output = running[1 - killed].communicate(timeout=SECONDS)[0]
    assert_reports_the_kill(killed, running[1 - killed].returncode, output)
    running[killed].communicate()


def connections(**hellos):
    """Connects with these greetings; returns the processes that process 0 accepts."""
    with peers._listener() as listener:
        port, sockets = listener.getsockname()[1], []
        for hello in hellos.values():
            sockets.append(socket.create_connection(("127.0.0.1", port)))
            sockets[-1].sendall(hello)
        accepted = peers._accept(listener, "secret", 1)
        refused = [sock for name, sock in zip(hellos, sockets, strict=True) if name != "good"]
        assert not any(sock.recv(1) for sock in refused)  # their connections are closed
        for end in (*sockets, *(end for connection in accepted for end in (connection._file, connection._socket))):
            end.close()
        return [(connection.process, connection.host) for connection in accepted]


def test_strangers_are_not_accepted(monkeypatch):
    monkeypatch.setattr(peers, "_CONNECT_SECONDS", 1)
    good = json.dumps({"token": "secret", "process": 1, "host": "node1"}).encode() + b"\n"
    strangers = {"http": b"GET / HTTP/1.1\r\n\r\n", "list": b"[]\n", "guess": good.replace(b"secret", b"public")}
    assert connections(**strangers, no_json=b"\xff\n", good=good) == [(1, "node1")]
    assert connections(**strangers) == []


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a: no"), 2, "a: no"),
        (OSError(28, "full", "/data/x"), 2, "full: /data/x"),
        (KeyError("x"), 1, "KeyError: 'x'"),
        (ValueError("first\nsecond"), 1, "ValueError: first"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
        (SystemExit(3), 3, "SystemExit: 3"),
        (SystemExit(), 0, "SystemExit"),
        (SystemExit("text"), 1, "SystemExit: text"),
    ],
)
def test_the_exit_code_and_the_line_of_an_error(error, code, line):
    assert peers._exit_code(error) == code
    assert error_line(error).rstrip(": ") == line
