"""An imitation of the Hugging Face Hub's API for uploads, on this machine."""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import pathlib
import threading
from collections.abc import Iterator

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

TOKEN = "hf_writer"
LICENSES = ("apache-2.0", "mit")


@dataclasses.dataclass
class Hub:
    """The repositories, by name and file. `Owner` may write.

    Attributes:
      commits: how many were made.
      fails: an HTTP status with which commits are refused; 0: they are accepted.
    """

    repositories: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    large: dict[str, bytes] = dataclasses.field(default_factory=dict)
    commits: int = 0
    fails: int = 0

    def create(self, body: dict) -> tuple[int, dict]:
        name = f"{body['organization']}/{body['name']}"
        if body["organization"] != "Owner":
            return 403, {"error": "You don't have the rights to create a model under the namespace"}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{constants.ENDPOINT}/{name}"}
        self.repositories[name] = {".gitattributes": b"*.safetensors filter=lfs"}
        return 200, {"url": f"{constants.ENDPOINT}/{name}", "name": name, "id": name}

    def validate(self, body: dict) -> tuple[int, dict]:
        license = yaml.safe_load(body["content"].split("---")[1]).get("license")
        errors = [] if license in (None, *LICENSES) else [{"message": f'"license" must be one of {LICENSES}'}]
        return (400 if errors else 200), {"errors": errors, "warnings": []}

    def preupload(self, body: dict) -> tuple[int, dict]:
        def mode(path: str) -> str:
            return "lfs" if path.endswith(".safetensors") else "regular"

        files = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in body["files"]]
        return 200, {"files": files}

    def batch(self, body: dict, address: str) -> tuple[int, dict]:
        objects = [
            {**item, "actions": {"upload": {"href": f"{address}/large/{item['oid']}"}}} for item in body["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def head(self, name: str) -> str:
        """The id of the newest commit of a repository."""
        return hashlib.sha1(repr(sorted(self.repositories[name].items())).encode()).hexdigest()

    def commit(self, name: str, lines: list[dict]) -> tuple[int, dict]:
        if self.fails:
            return self.fails, {"error": "Forbidden: you need write access"}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit") not in (None, self.head(name)):
                    return 412, {"error": "A commit has happened since. Please refresh and try again."}
            elif line["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[name][value["path"]] = self.large[value["oid"]]
        self.commits += 1
        oid = f"{self.commits:040x}"
        return 200, {"commitUrl": f"{constants.ENDPOINT}/{name}/commit/{oid}", "commitOid": oid}


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serves requests on this machine. Yields the address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def hub_server(hub: Hub) -> Iterator[str]:
    """Serves the hub's API. Yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = "/".join(self.path.partition("?")[0].split("/")[3:5])  # of /api/models/OWNER/NAME/...
            files = hub.repositories.get(name)
            if files is None:
                self.reply(404, {"error": "Repository not found"})
            else:
                oids = {path: hashlib.sha1(data).hexdigest() for path, data in files.items()}
                tree = [{"type": "file", "path": path, "size": len(files[path]), "oid": oids[path]} for path in files]
                self.reply(200, tree if "/tree/" in self.path else {"id": name, "sha": hub.head(name), "siblings": []})

        def do_PUT(self) -> None:
            data, oid = self.body(), self.path.rpartition("/")[2]
            assert hashlib.sha256(data).hexdigest() == oid
            hub.large[oid] = data
            self.reply(200, {})

        def do_POST(self) -> None:
            body = [json.loads(line) for line in self.body().splitlines()]
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                self.reply(401, {"error": "Invalid username or password."})
            elif self.path == "/api/repos/create":
                self.reply(*hub.create(body[0]))
            elif self.path == "/api/validate-yaml":
                self.reply(*hub.validate(body[0]))
            elif "/preupload/" in self.path:
                self.reply(*hub.preupload(body[0]))
            elif self.path.endswith("/info/lfs/objects/batch"):
                self.reply(*hub.batch(body[0], f"http://{self.headers['Host']}"))
            else:
                _, _, _, owner, repository, kind, _ = self.path.split("/")
                assert kind == "commit"
                self.reply(*hub.commit(f"{owner}/{repository}", body))

        def body(self) -> bytes:
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"]))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(parts)

        def reply(self, status: int, value: object) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as address:
        yield address


@contextlib.contextmanager
def connected_hub(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path) -> Iterator[Hub]:
    """Yields an empty hub, which huggingface_hub uses in this process with a token that may write."""
    hub = Hub()
    with hub_server(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def card_metadata(text: str) -> dict:
    """Returns the metadata of a model card, as the Hub's own package reads it."""
    return huggingface_hub.ModelCard(text).data.to_dict()
