"""Data sets on the Hugging Face Hub (hf://datasets/...) give the sentences of the same files on a disk."""

import contextlib
import hashlib
import http.server
import json
import urllib.parse

import pytest
from build_kit import build_records
from hub_kit import serving
from huggingface_hub import HfFileSystem, constants
from source_kit import files_of, structs, write_parquet, write_tars

from EasyLM.errors import UserError

NAME = "Owner/pets"


@contextlib.contextmanager
def dataset_server(files: dict[str, bytes]):
    """Imitates the Hub's API for reading one data set. Yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urllib.parse.unquote(self.path.partition("?")[0])
            if path.startswith(f"/api/datasets/{NAME}/tree/main"):
                folder = path.partition("/tree/main")[2].strip("/")
                entries = list(tree(folder, recursive="recursive=True" in self.path))
                self.reply(entries if entries else {"error": "not found"}, 200 if entries else 404)
            elif path.startswith(f"/api/datasets/{NAME}"):
                self.reply({"id": NAME, "sha": "0" * 40})
            elif (name := path.partition(f"/datasets/{NAME}/resolve/main/")[2]) in files:
                begin, _, end = (self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")
                self.reply(files[name][int(begin) : int(end) + 1 if end else None], 206 if end else 200)
            else:
                self.reply({"error": "Repository not found"}, 404)

        def do_POST(self) -> None:  # paths-info
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self.reply([entry for entry in tree("", recursive=True) if json.dumps(entry["path"]) in body])

        def reply(self, value: object, status: int = 200) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Error-Code", "EntryNotFound" if "/tree/" in self.path else "RepoNotFound")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    def tree(folder: str, recursive: bool):
        prefix = f"{folder}/" if folder else ""
        folders = {}
        for path, data in files.items():
            if not path.startswith(prefix):
                continue
            inner = path.removeprefix(prefix).split("/")
            for depth in range(1, len(inner)):
                folders[prefix + "/".join(inner[:depth])] = depth
            if recursive or len(inner) == 1:
                oid = hashlib.sha1(data).hexdigest()
                yield {"type": "file", "path": path, "size": len(data), "oid": oid}
        for path, depth in folders.items():
            if recursive or depth == 1:
                yield {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}

    with serving(Handler) as address:
        yield address


@pytest.fixture
def hub(tree, tmp_path, monkeypatch):
    """Serves the images of the tests as files, tars and a table."""
    images = files_of(tree / "image")
    write_parquet(tmp_path / "table.parquet", {"picture": structs(images)})
    files = {f"files/a/{name}": data for name, data in images.items()}
    files |= {f"tars/{path.name}": path.read_bytes() for path in write_tars(tmp_path / "tars", images)}
    files["table/train.parquet"] = (tmp_path / "table.parquet").read_bytes()
    with dataset_server(files) as address:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}{template}")
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        HfFileSystem.clear_instance_cache()
        yield f"hf://datasets/{NAME}"
        HfFileSystem.clear_instance_cache()


@pytest.mark.parametrize("source", ["files", "files/a", "tars/*.tar", "tars/{000..001}.tar", "table"])
def test_the_same_images_give_the_same_sentences(hub, tree, tiny, tmp_path, source):
    expected = build_records("", tiny, tmp_path / "expected.jsonl", "images", input_dir=str(tree / "image"))
    built = build_records("", tiny, tmp_path / "out.jsonl", "images", input_dir=f"{hub}/{source}")
    assert len(expected) == len(built) > 0
    assert [tokens.tolist() for tokens, _ in built] == [tokens.tolist() for tokens, _ in expected]


@pytest.mark.parametrize("address", ["{hub}/none", "hf://datasets/Owner/none/a"])
def test_what_is_not_there_is_named(hub, tiny, tmp_path, address):
    value = address.format(hub=hub)
    with pytest.raises(UserError, match=f"--input_dir={value}: no such folder"):
        build_records("", tiny, tmp_path / "out.jsonl", "images", input_dir=value)
