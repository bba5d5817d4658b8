"""Names on the Hugging Face Hub, with its cache and its server imitated on this machine."""

import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from hub_cache import cache_repository, offline_cache
from huggingface_hub import constants

from EasyLM.errors import UserError
from EasyLM.storage import local_path, path_on_disk

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty cache, and no network."""
    return offline_cache(tmp_path, monkeypatch)


def test_a_name_is_its_snapshot_in_the_cache(cache):
    snapshot = cache_repository(cache, "Owner/model", {"config.json": b"{}", "model.safetensors": b"a"})
    assert local_path("Owner/model") == local_path("Owner/model/") == str(snapshot)


def test_a_name_takes_a_revision_and_a_folder_and_a_file(cache):
    files = {"small/config.json": b"{}", "small/pytorch_model.bin": b"a", "run/streaming_params": b"b"}
    snapshot = cache_repository(cache, "Owner/model", files, revision="v2")
    assert local_path("Owner/model@v2/small") == str(snapshot / "small")
    assert local_path("Owner/model@v2/run/streaming_params") == str(snapshot / "run" / "streaming_params")


def test_a_file_may_have_any_name(cache):
    snapshot = cache_repository(cache, "Owner/model", {"imported/params": b"a"})
    assert local_path("Owner/model/imported/params") == str(snapshot / "imported" / "params")


def test_the_revision_of_a_pull_request_has_slashes(cache):
    files = {"model.safetensors": b"a", "small/model.safetensors": b"b"}
    snapshot = cache_repository(cache, "Owner/model", files, revision="refs/pr/1")
    assert local_path("Owner/model@refs/pr/1") == str(snapshot)
    assert local_path("Owner/model@refs/pr/1/small") == str(snapshot / "small")
    with pytest.raises(UserError, match=r"`hf download Owner/other --revision refs/pr/1 --local-dir DIR`"):
        local_path("Owner/other@refs/pr/1")


def test_a_local_path_wins(cache, tmp_path):
    cache_repository(cache, "Owner/model", {"model.safetensors": b"a"})
    (tmp_path / "Owner" / "model").mkdir(parents=True)
    assert local_path("Owner/model") == "Owner/model"


@pytest.mark.parametrize(
    "path", ["/no/such", "./Owner/model", "model", "../a/b", "gs://bucket/model", "Owner/model@", ""]
)
def test_other_paths_are_no_names(cache, path):
    assert local_path(path) == path


@pytest.mark.parametrize("name", ["Owner/other", "Owner/model@v1", "Owner/model/none", "Owner/model/none.bin"])
def test_what_the_cache_lacks_is_one_line_that_says_what_to_do(cache, name):
    cache_repository(cache, "Owner/model", {"config.json": b"{}", "model.safetensors": b"a"})
    with pytest.raises(UserError, match=f"^{name}: ") as error:
        local_path(name)
    assert "\n" not in str(error.value) and "Hugging Face Hub" in str(error.value)
    assert "run `hf download Owner/" in str(error.value) and str(error.value).endswith(f" to {cache}")


def test_an_interrupted_download_is_not_taken_for_a_repository_without_weights(cache):
    cache_repository(cache, "Owner/model", {"config.json": b"{}"})
    with pytest.raises(
        UserError, match=r"with weights .* \(without a network: in its cache, where a download may be inc"
    ):
        local_path("Owner/model")


def test_a_cached_name_is_read_while_the_hub_cannot_be_reached(cache, monkeypatch, port):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    snapshot = cache_repository(cache, "Owner/model", {"config.json": b"{}", "model.safetensors": b"a"})
    assert local_path("Owner/model") == str(snapshot)
    with pytest.raises(UserError, match=r"^Owner/other: .* cannot provide it \(.*[Cc]onnect.*\); where there is a net"):
        local_path("Owner/other")


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("gs://bucket/model", "copy it to a disk and give that path"),
        ("unknown://bucket/model", "copy it to a disk and give that path"),
        ("hf://Owner/model@v2/small", "give the name Owner/model@v2/small"),
    ],
)
def test_directories_of_object_stores_are_refused(path, remedy):
    message = f"{path}: a tokenizer is read from a local disk, or by its name on the Hugging Face Hub (OWNER/NAME)"
    with pytest.raises(UserError, match=f"^{re.escape(message)}: {remedy}$"):
        path_on_disk(path, "a tokenizer")


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


def local_path_of(name: str, home: pathlib.Path, **settings: str) -> pathlib.Path:
    """Returns the local path of a name, as a program with these settings of huggingface_hub finds it."""
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | settings
    main = f"flags.run(lambda _: print(local_path({name!r})), {{}}, ['program'])"
    command = [sys.executable, "-c", f"from EasyLM import flags; from EasyLM.storage import local_path; {main}"]
    program = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert "HTTP Request" not in program.stderr
    return pathlib.Path(program.stdout.strip())


@pytest.mark.slow
def test_a_repository_is_downloaded_once_and_in_one_form(tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"the same", "README.md": b"x"}
    below = {f"older/{name}": data for name, data in files.items()}
    with hub_server(files | below) as (address, downloads):
        directory = local_path_of("Owner/model", tmp_path, HF_ENDPOINT=address)
        assert (directory / "model.safetensors").read_bytes() == b"weights"
        assert sorted(downloads) == ["README.md", "config.json", "model.safetensors"]
        assert local_path_of("Owner/model", tmp_path, HF_ENDPOINT=address) == directory
        assert len(downloads) == 3
    assert local_path_of("Owner/model", tmp_path, HF_HUB_OFFLINE="1") == directory


@pytest.mark.slow
def test_a_folder_with_a_dot_in_its_name_is_downloaded(tmp_path):
    files = {f"v1.5/{name}": name.encode() for name in ("config.json", "model.safetensors")}
    with hub_server(files | {"v1.5.json": b"{}", "model.safetensors": b"another"}) as (address, downloads):
        directory = local_path_of("Owner/model/v1.5", tmp_path, HF_ENDPOINT=address)
    assert {path.name: path.read_text() for path in directory.iterdir()} == {
        "config.json": "config.json",
        "model.safetensors": "model.safetensors",
    }
    assert "model.safetensors" not in downloads


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Owner/model", "Owner/model@v2/small", "Owner/model/run/streaming_params"])
def test_the_advice_for_machines_without_a_network(cache, tmp_path, name):
    """The command of the message, run where there is a network, and its results, put where the message says."""
    paths = ("config.json", "model.safetensors", "small/config.json", "small/model.safetensors", "run/streaming_params")
    files = {path: path.encode() for path in paths} | {"run/metadata.json": b"{}", "run/other.bin": b"unused"}
    with pytest.raises(UserError, match=r"^Owner/model.*: there is no such local path") as raised:
        local_path(name)
    command, given, copied, place = re.findall(
        r"run `(.*)` and give (\S+) instead, or run it without --local-dir and copy (\S+) from .* to (\S+)$",
        str(raised.value),
    )[0]
    with hub_server(files) as (address, _):
        own = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        environment = os.environ | own | {"HF_ENDPOINT": address}
        for text in (command, command.replace(" --local-dir DIR", "")):
            _, *arguments = shlex.split(text.replace("DIR", str(tmp_path / "copy")))
            program = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()"]
            subprocess.run([*program, *arguments], env=environment, check=True, timeout=60, capture_output=True)
    local = pathlib.Path(local_path(given.replace("DIR", str(tmp_path / "copy"))))
    shutil.copytree(tmp_path / "home" / "hub" / copied, f"{place}/{copied}", symlinks=True)
    cached = pathlib.Path(local_path(name))
    for path in (local, cached):
        if path.is_dir():
            folder = "small/" if "small" in name else ""
            assert (path / "model.safetensors").read_text() == f"{folder}model.safetensors"
        else:
            assert path.read_text() == "run/streaming_params" and (path.parent / "metadata.json").exists()
            assert not (path.parent / "other.bin").exists()
