"""Runs the HTTP service until a signal: uvicorn, warm-up and graceful shutdown."""

import contextlib
import dataclasses
import logging
import threading
from concurrent.futures import Future
from types import FrameType

from evaluation.prompting import GenerationSettings
from evaluation.serving.app import make_app
from evaluation.serving.engine import Engine
from evaluation.serving.header_check import LOCAL_HOSTS, with_own_host
from evaluation.serving.limits import Limits, with_idle_timeout


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Address, access and shutdown of the service.

    Attributes:
      host, port: the address to listen on.
      token: bearer token that POST requests must send; empty: no authorization.
      allowed_hosts: see `HeaderCheck`.
      stop_seconds: timeout of accepted requests after a signal.
    """

    host: str
    port: int
    token: str
    stop_seconds: float
    allowed_hosts: str = LOCAL_HOSTS


def run_server(engine: Engine, limits: Limits, settings: ServerSettings) -> int:
    """Serves requests until a signal. Returns the exit code: 0 if all accepted requests were answered, else 1."""
    import uvicorn

    class Server(uvicorn.Server):
        """Keeps its socket open during shutdown, to refuse requests. uvicorn closes it at the first signal."""

        finished = False  # whether all accepted requests were answered
        stopping = False

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.stopping:
                self.should_exit = self.force_exit = True
                return
            self.stopping = True
            threading.Thread(target=self.finish, daemon=True).start()  # a signal handler must not wait

        def finish(self) -> None:
            logging.info("stopping: accepted requests are finished, new ones are refused")
            self.finished = engine.close(settings.stop_seconds)
            self.should_exit = True

        def on_warmed_up(self, future: Future) -> None:
            if not future.cancelled() and future.exception():
                self.stopping = self.should_exit = True

    server = Server(
        uvicorn.Config(
            make_app(engine, limits, settings.token, with_own_host(settings.allowed_hosts, settings.host)),
            host=settings.host,
            port=settings.port,
            http=with_idle_timeout(limits),
            server_header=False,
            timeout_graceful_shutdown=int(settings.stop_seconds) + 1,  # time to send responses to slow clients
        )
    )
    engine.warm_up(GenerationSettings()).add_done_callback(server.on_warmed_up)
    with contextlib.suppress(SystemExit):  # uvicorn cannot bind the address; it has logged the reason
        server.run()
    return 0 if server.finished else 1
