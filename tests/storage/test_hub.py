"""Names on the Hugging Face Hub, with its cache and its server imitated on this machine."""

import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from EasyLM.errors import UserError
from EasyLM.storage import local_path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_repository(cache: pathlib.Path, name: str, files: dict[str, str], revision: str = "main") -> pathlib.Path:
    """Lays out a repository as the Hub's cache does: a reference to a commit, and its snapshot."""
    directory = cache / f"models--{name.replace('/', '--')}"
    (directory / "refs").mkdir(parents=True)
    (directory / "refs" / revision).write_text(COMMIT)
    for path, text in files.items():
        file = directory / "snapshots" / COMMIT / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return directory / "snapshots" / COMMIT


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def test_a_name_is_its_snapshot_in_the_cache(cache):
    snapshot = cache_repository(cache, "Owner/model", {"config.json": "{}", "model.safetensors": "a"})
    assert local_path("Owner/model") == local_path("Owner/model/") == str(snapshot)


def test_a_name_takes_a_revision_and_a_folder_and_a_file(cache):
    files = {"small/config.json": "{}", "small/pytorch_model.bin": "a", "run/streaming_params": "b"}
    snapshot = cache_repository(cache, "Owner/model", files, revision="v2")
    assert local_path("Owner/model@v2/small") == str(snapshot / "small")
    assert local_path("Owner/model@v2/run/streaming_params") == str(snapshot / "run" / "streaming_params")


def test_a_local_path_wins(cache, tmp_path):
    cache_repository(cache, "Owner/model", {"model.safetensors": "a"})
    (tmp_path / "Owner" / "model").mkdir(parents=True)
    assert local_path("Owner/model") == "Owner/model"


@pytest.mark.parametrize(
    "path", ["/no/such", "./Owner/model", "model", "../a/b", "gs://bucket/model", "Owner/model@", ""]
)
def test_other_paths_are_no_names(cache, path):
    assert local_path(path) == path


@pytest.mark.parametrize("name", ["Owner/other", "Owner/model@v1", "Owner/model/none", "Owner/model/none.bin"])
def test_what_the_cache_lacks_is_one_line_that_says_what_to_do(cache, name):
    cache_repository(cache, "Owner/model", {"config.json": "{}", "model.safetensors": "a"})
    with pytest.raises(UserError, match=f"^{name}: ") as error:
        local_path(name)
    assert "\n" not in str(error.value) and "Hugging Face Hub" in str(error.value)
    if "none" not in name:
        assert "hf download Owner/" in str(error.value)


def test_an_interrupted_download_is_not_taken_for_a_repository_without_weights(cache):
    cache_repository(cache, "Owner/model", {"config.json": "{}"})
    with pytest.raises(
        UserError, match=r"with weights .* \(without a network: in its cache, where a download may be inc"
    ):
        local_path("Owner/model")


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://huggingface.co/Owner/model", "Owner/model"),
        ("huggingface.co/Owner/model/", "Owner/model"),
        ("https://hf.co/Owner/model/tree/v2", "Owner/model@v2"),
        ("https://huggingface.co/Owner/model/tree/main/small/", "Owner/model@main/small"),
        ("https://huggingface.co/Owner/model/blob/main/run/streaming_params", "Owner/model@main/run/streaming_params"),
    ],
)
def test_the_address_of_a_page_is_answered_with_the_name(cache, address, name):
    with pytest.raises(UserError, match=f"^{address}: the address of a page of the Hugging Face Hub: .*, {name}$"):
        local_path(address)


def test_the_address_of_a_file_is_a_remote_path():
    address = "https://huggingface.co/Owner/model/resolve/main/streaming_params"
    assert local_path(address) == address


@contextlib.contextmanager
def hub_server(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serves a repository as the Hub's API does. Yields the address and the list of downloaded files."""
    downloads = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(head=True)

        def do_GET(self) -> None:
            self.answer(head=False)

        def answer(self, head: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/Owner/model/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                self.reply(json.dumps(tree).encode(), head)
            elif path.startswith("/api/models/Owner/model"):
                siblings = [{"rfilename": name} for name in files]
                self.reply(json.dumps({"id": "Owner/model", "sha": COMMIT, "siblings": siblings}).encode(), head)
            elif (name := path.partition(f"/Owner/model/resolve/{COMMIT}/")[2]) in files:
                if not head:
                    downloads.append(name)
                self.reply(files[name], head, {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"'})
            else:
                self.send_error(404)

        def reply(self, body: bytes, head: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(200)
            for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if not head:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloads
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_repository_is_downloaded_once_and_in_one_form(tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"the same", "README.md": b"x"}
    program = "from EasyLM.storage import local_path; print(local_path('Owner/model'))"

    def run(**settings: str) -> pathlib.Path:
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"} | settings
        command = [sys.executable, "-c", program]
        return pathlib.Path(subprocess.check_output(command, env=environment, text=True, timeout=60).strip())

    with hub_server(files) as (address, downloads):
        directory = run(HF_ENDPOINT=address)
        assert (directory / "model.safetensors").read_bytes() == b"weights"
        assert sorted(downloads) == ["README.md", "config.json", "model.safetensors"]
        assert run(HF_ENDPOINT=address) == directory
        assert len(downloads) == 3
    assert run(HF_HUB_OFFLINE="1") == directory
