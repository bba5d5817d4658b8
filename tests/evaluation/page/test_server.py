"""The page's own server process: hosts, origins, ambiguous bodies and uploads, over sockets."""

import pathlib
import re
import signal
import socket

import httpx
import pytest
from page_kit import SECONDS, running_page
from serve_kit import png

EVIL = {"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "null"}


@pytest.fixture
def page(tmp_path: pathlib.Path, port: int):
    """Starts the page without warming up, behind a proxy that is gone. Yields its URL and the folder of its files."""
    flags = ("--warm_up=", "--allowed_hosts=lab.example")
    options = {"TMPDIR": str(tmp_path), "http_proxy": "http://127.0.0.1:9"}
    with running_page(port, *flags, stop=signal.SIGTERM, **options) as when_ready:
        yield when_ready(), tmp_path
    (tmp_path / "private.png").unlink()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # uploads are removed at the end


@pytest.mark.slow
def test_the_page_checks_hosts_origins_and_uploads(page):
    url, folder = page
    upload = f"{url}/gradio_api/upload"
    with httpx.Client(timeout=SECONDS) as client:
        assert client.get(url, headers={"host": "lab.example", "origin": "https://lab.example"}).status_code == 200
        for headers in EVIL:
            assert client.get(url, headers=headers).status_code == 403
            assert client.post(upload, headers=headers, files={"files": png(1)}).status_code == 403
        (path,) = client.post(upload, files={"files": png(1)}).json()
        assert pathlib.Path(path).read_bytes() == png(1) and folder in pathlib.Path(path).parents
        too_large = client.post(upload, files=[("files", bytes(13 * 2**20))] * 5)
        assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "body_too_large")
        large_body = client.post(f"{url}/gradio_api/queue/join", content=b"[" * (2**20 + 1))
        assert (large_body.status_code, large_body.json()["error"]["code"]) == (413, "body_too_large")
        assert "no longer stored" in answer_to_frame(client, url, write_private_image(folder))
        statuses = []
        for number in range(30):  # 300 MB
            response = client.post(upload, files={"files": number.to_bytes() + bytes(10 * 2**20)})
            statuses.append(response.status_code)
        assert statuses[:20] == [200] * 20 and set(statuses[20:]) == {200, 429}
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert stored < 270 * 2**20
    assert_ends_connection(int(url.rpartition(":")[2]))


@pytest.mark.slow
def test_beside_a_running_batch_the_interpreter_does_not_shut_down(port, capsys):
    """It would abort the process: a thread returns from native code.

    The page starts on a busy machine: gradio's request to it takes too long.
    """
    running = "import atexit; from evaluation.serving import Engine; Engine.close = lambda *_: False"
    busy = "import gradio.networking; gradio.networking.url_ok = lambda _: False"
    preparation = f"{running}; {busy}; atexit.register(print, 'shutdown')"
    with running_page(port, "--warm_up=", stop=signal.SIGINT, preparation=preparation) as when_ready:
        when_ready()
    output = capsys.readouterr().out
    assert "Closing server" in output and "shutdown" not in output


def assert_ends_connection(port: int) -> None:
    """Asserts that what follows a body of two lengths is not taken for a second request."""
    request = b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n"
    request += b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /config HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
        connection.sendall(request)
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"400"], answer


def write_private_image(folder: pathlib.Path) -> str:
    """Writes an image beside the page's folder."""
    (page_folder,) = folder.glob("lvm_demo_*")
    path = page_folder.with_name("private.png")
    path.write_bytes(png(2))
    return str(path)


def answer_to_frame(client: httpx.Client, url: str, path: str) -> str:
    """Draws after one frame, and returns the answer. The request does not mark the path as one of gradio's files."""
    config = client.get(f"{url}/config").json()
    components = {component["id"]: component["props"] for component in config["components"]}
    draws = [
        dependency
        for dependency in config["dependencies"]
        # An event that follows another one has no component. Others of the button run in the browser.
        if dependency["backend_fn"]
        and any(components.get(target, {}).get("elem_id") == "draw_sequence" for target, _ in dependency["targets"])
    ]
    values = [components[i].get("value") for i in draws[0]["inputs"]]
    frames = next(k for k, i in enumerate(draws[0]["inputs"]) if components[i].get("elem_id") == "frames")
    values[frames] = [{"image": {"path": path}, "caption": None}]
    request = {"data": values, "fn_index": draws[0]["id"], "session_hash": "a"}
    client.post(f"{url}/gradio_api/queue/join", json=request).raise_for_status()
    with client.stream("GET", f"{url}/gradio_api/queue/data?session_hash=a") as events:
        return next(line for line in events.iter_lines() if "process_completed" in line)
