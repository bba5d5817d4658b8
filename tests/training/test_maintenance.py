"""Announced maintenance and preemption of TPU machines, with a stand-in for the metadata server."""

import pathlib
import socket
import threading
import time

import metadata_kit
import pytest
from metadata_kit import MAINTENANCE, PREEMPTED, TERMINATE, MetadataServer
from tiny_run import await_metrics, finish, metrics, start

from EasyLM.checkpoints import streaming
from EasyLM.training import StopSignals, maintenance
from EasyLM.training.maintenance import MaintenanceWatch
from EasyLM.training.stop_signal import request_stop

PROGRAM = (str(pathlib.Path(metadata_kit.__file__).with_name("maintenance_program.py")),)
FAILURE = " from the metadata server: "
BEFORE = f"{MAINTENANCE} was {TERMINATE} before this run started; it trains until a signal stops it"
SECONDS = 60  # the longest wait for an event


@pytest.fixture
def requested(monkeypatch):
    """An event: the run is to stop. The CPUs pass for TPUs, and failures are tried again at once."""
    event = threading.Event()
    monkeypatch.setattr(maintenance, "request_stop", event.set)
    monkeypatch.setattr(maintenance, "_PLATFORM", "cpu")
    monkeypatch.setattr(maintenance, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(maintenance, "_TIMEOUT_SECONDS", 20)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # the metadata server is never behind a proxy
    return event


@pytest.fixture
def server(monkeypatch):
    with MetadataServer() as served:
        monkeypatch.setenv("GCE_METADATA_HOST", served.host)
        yield served


def await_answers(server: MetadataServer, count: int) -> None:
    """Waits for this many further answers. Each of the two watches receives some: it asks again after each."""
    enough, deadline = server.answers + count, time.monotonic() + SECONDS
    while server.answers < enough:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("value", ["NONE", "MIGRATE_ON_HOST_MAINTENANCE", "", "true"])
def test_what_does_not_end_the_machine_changes_nothing(requested, server, caplog, value):
    with MaintenanceWatch():
        await_answers(server, 4)
        server.announce(MAINTENANCE, value)
        await_answers(server, 20)
    assert not requested.is_set() and not caplog.text


@pytest.mark.parametrize("key, value", [(MAINTENANCE, TERMINATE), (PREEMPTED, "TRUE")])
def test_the_end_of_the_machine_stops_the_run(requested, server, caplog, key, value):
    with MaintenanceWatch():
        await_answers(server, 4)
        server.announce(key, value)
        assert requested.wait(SECONDS)
    assert caplog.messages == [f"this machine will be stopped ({key} is {value}); the run stops as after SIGTERM"]


def test_a_run_that_starts_during_a_notice_stops_at_the_next_one(requested, server, caplog):
    """Its scheduler has started it again at once, on the same machine."""
    server.announce(MAINTENANCE, TERMINATE)
    with MaintenanceWatch():
        await_answers(server, 20)
        assert not requested.is_set()
        server.announce(MAINTENANCE, "NONE")
        await_answers(server, 8)
        server.announce(MAINTENANCE, TERMINATE)
        assert requested.wait(SECONDS)
    assert caplog.messages[0] == BEFORE and len(caplog.messages) == 2


def test_only_tpus_are_watched(requested, server, monkeypatch):
    monkeypatch.setattr(maintenance, "_PLATFORM", "tpu")
    before = set(threading.enumerate())  # some may be about to end, of other tests
    with MaintenanceWatch():
        assert set(threading.enumerate()) <= before
    assert not server.answers


@pytest.mark.parametrize("status", [404, 503, 302])
def test_errors_of_the_server_are_logged_once_and_retried(requested, server, caplog, status):
    server.statuses = [status] * 6
    with MaintenanceWatch():
        await_answers(server, 8)
        server.announce(MAINTENANCE, TERMINATE)
        assert requested.wait(SECONDS)
    assert FAILURE in caplog.messages[0] and f"{status} " in caplog.messages[0] and len(caplog.messages) == 2


def test_a_server_that_comes_late_is_found(requested, monkeypatch, caplog, port):
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{port}")
    with MaintenanceWatch():
        deadline = time.monotonic() + SECONDS
        while not caplog.messages:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with MetadataServer(port) as late:
            await_answers(late, 8)
            late.announce(PREEMPTED, "TRUE")
            assert requested.wait(SECONDS)
    assert FAILURE in caplog.messages[0] and "ConnectionRefused" in caplog.messages[0] and len(caplog.messages) == 2


@pytest.mark.parametrize("host", ["127.0.0.1:none", "http://127.0.0.1:80", "a..b", "\udc80", "x" * 100, "[::1"])
def test_a_name_that_is_no_host_is_logged_once(requested, monkeypatch, caplog, host):
    """A thread that ended with an error would fail the test."""
    monkeypatch.setenv("GCE_METADATA_HOST", host)
    request, failures = maintenance._request, []

    def counted(*arguments):
        try:
            return request(*arguments)
        finally:
            failures.append(arguments)

    monkeypatch.setattr(maintenance, "_request", counted)
    with MaintenanceWatch():
        deadline = time.monotonic() + SECONDS
        while len(failures) < 6:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert len(caplog.messages) == 1 and FAILURE in caplog.text and not requested.is_set()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"TRUE",
        b"\0\xff" * 50_000,
        b"HTTP/1.1 200 OK\r\n\r\nTRUE",  # of another server, such as the page of a network's login
        b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\n\r\n" + b"TRUE\n" * 50_000,
        b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\nContent-Length: 9\r\n\r\nTRU",
        b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\nETag: \x80 \xff\r\n\r\n\xff\xfe",
    ],
)
def test_garbage_changes_nothing(requested, monkeypatch, caplog, answer):
    served = threading.Semaphore(0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{listener.getsockname()[1]}")

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(10_000)
                        connection.sendall(answer)
                except OSError:
                    if listener.fileno() < 0:
                        return
                served.release()

        threading.Thread(target=serve, daemon=True).start()
        with MaintenanceWatch():
            for _ in range(6):
                assert served.acquire(timeout=SECONDS)
        listener.shutdown(socket.SHUT_RDWR)
    assert not requested.is_set() and len(caplog.messages) <= 1


def test_another_kind_of_server_is_not_believed(requested, server, caplog):
    server.flavor = "other"
    with MaintenanceWatch():
        await_answers(server, 8)
        server.announce(MAINTENANCE, TERMINATE)
        await_answers(server, 8)
    assert not requested.is_set() and len(caplog.messages) == 1 and FAILURE in caplog.text


def test_nothing_waits_for_a_server_that_does_not_answer(requested, monkeypatch, caplog):
    monkeypatch.setattr(maintenance, "_TIMEOUT_SECONDS", SECONDS)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{listener.getsockname()[1]}")
        with MaintenanceWatch():
            connections = [listener.accept()[0] for _ in range(2)]
        waiting = [thread for thread in threading.enumerate() if thread.name.startswith("watch of ")]
        assert len(waiting) >= 2 and all(thread.daemon for thread in waiting)
        for connection in connections:
            connection.sendall(b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\n\r\nNONE")
            connection.close()
    for thread in waiting:
        thread.join()
    assert not caplog.text and not requested.is_set()


def test_after_the_exit_no_stop_is_requested(requested, server):
    with MaintenanceWatch() as watch:
        await_answers(server, 4)
    watch._stop(MAINTENANCE, TERMINATE)  # a thread that has just received the announcement
    assert not requested.is_set()


def test_without_stop_signals_a_request_does_not_end_the_process():
    assert StopSignals._outermost is None
    request_stop()


@pytest.mark.slow
def test_a_run_saves_before_maintenance_and_continues_during_the_notice(tmp_path, server):
    settings = {"mesh_dim": "1,1,1", "devices": 1, "program": PROGRAM}
    process = start(tmp_path, total_steps=10**6, **settings)
    await_metrics([process], tmp_path / "run" / "metrics.jsonl")
    server.announce(MAINTENANCE, TERMINATE)
    output = finish(process, code=75)
    announced = output.index(f"this machine will be stopped ({MAINTENANCE} is {TERMINATE})")
    assert announced < output.index("SIGTERM: stopping after the step in progress") < output.index("to resume")
    done = max(metrics(tmp_path / "run", "loss")) + 1
    assert saved_step(tmp_path / "run") == done
    output = finish(start(tmp_path, total_steps=done + 2, **settings))
    assert f"finished after step {done + 2}" in output and BEFORE in output


@pytest.mark.slow
def test_one_process_that_sees_the_preemption_stops_both_after_the_same_step(tmp_path, server, monkeypatch, port):
    """The other one has no metadata server, which it logs once."""
    settings = {
        "mesh_dim": "1,4,1",
        "total_steps": 10**6,
        "log_all_worker": True,
        "jax_distributed__initialize_jax_distributed": True,
        "jax_distributed__coordinator_address": f"127.0.0.1:{port}",
        "jax_distributed__num_processes": 2,
    }
    running = [start(tmp_path, 2, PROGRAM, **settings, jax_distributed__process_id=0)]
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    running.append(start(tmp_path, 2, PROGRAM, **settings, jax_distributed__process_id=1))
    logs = [tmp_path / "run" / name for name in ("metrics.jsonl", "metrics_1.jsonl")]
    await_metrics(running, *logs)
    server.announce(PREEMPTED, "TRUE")
    first, second = finish(*running, code=75)
    assert f"this machine will be stopped ({PREEMPTED} is TRUE)" in first and FAILURE not in first
    assert "this machine will be stopped" not in second and second.count(FAILURE) == 1
    (done,) = {len(log.read_text().splitlines()) for log in logs}
    assert 0 < done < 10**6 and saved_step(tmp_path / "run") == done


def saved_step(run_dir: pathlib.Path) -> int:
    entries = streaming.read_streaming(run_dir / "streaming_train_state")
    return next(int(entry.read()) for entry in entries if entry.key == ("step",))
