"""A stand-in for the metadata server of a Google Cloud machine, as its documentation describes it."""

import http.server
import threading
import urllib.parse

MAINTENANCE, PREEMPTED = "maintenance-event", "preempted"
TERMINATE = "TERMINATE_ON_HOST_MAINTENANCE"


class MetadataServer:
    """A context that serves two keys of the machine on 127.0.0.1.

    Args:
      port: 0: any.
      wait_seconds: the longest wait for a change; requests may ask for less.
    """

    def __init__(self, port: int = 0, wait_seconds: float = 0.05):
        self._values, self._version = {MAINTENANCE: "NONE", PREEMPTED: "FALSE"}, 1
        self.answers = 0  # how often a value was sent
        self.statuses: list[int] = []  # of the next answers, instead of 200
        self.flavor = "Google"
        self._changed = threading.Condition()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urllib.parse.urlsplit(self.path)
                folder, _, key = url.path.rpartition("/")
                known = folder == "/computeMetadata/v1/instance" and self.headers["Metadata-Flavor"] == "Google"
                query = dict(urllib.parse.parse_qsl(url.query))
                with server._changed:
                    status = server.statuses.pop() if server.statuses else 200 if known else 403
                    if status == 200 and query["wait_for_change"] == "true":
                        seconds = min(wait_seconds, float(query["timeout_sec"]))
                        server._changed.wait_for(lambda: server._etag(key) != query["last_etag"], seconds)
                        server.answers += 1
                    value, etag = server._values.get(key, ""), server._etag(key)
                self.send_response(status)
                self.send_header("Metadata-Flavor", server.flavor)
                self.send_header("ETag", etag)
                self.end_headers()
                self.wfile.write(value.encode() if status == 200 else b"an error page")

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "MetadataServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,)).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def announce(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value
            self._version += 1
            self._changed.notify_all()

    def _etag(self, key: str) -> str:
        return f"{self._version:x} {key}"  # quoted in a query
