"""The HTTP service of a model: `python -m evaluation.serve --checkpoint=C --vqgan=V --port=8000`.

`http://127.0.0.1:8000/docs` describes it. It listens on this machine alone unless `--host` says otherwise. SIGTERM or
Ctrl-C ends it: new requests are refused, those taken are finished, then it exits with code 0 (1 if that takes longer
than `--stop_seconds`); a second one ends it at once. `EasyLM.models.llama.llama_serve` is an alias of this program.
"""

import contextlib
import logging
import os
import sys
import threading

from EasyLM.errors import UserError, check_installed
from EasyLM.flags import Flag, run
from evaluation.serving.engine import ENGINE_FLAGS, Engine, Settings
from evaluation.serving.uploads import Limits

FLAGS = {
    **ENGINE_FLAGS,
    "host": Flag("127.0.0.1", "Address to listen on; 0.0.0.0: every network that this machine is in."),
    "port": Flag(8000, "Port to listen on."),
    "token": Flag("", "Every request must bear it; '$NAME' takes it from the environment. Empty: none is asked for."),
    "max_body_mb": Flag(16, "Size of a request's body."),
    "max_request_pictures": Flag(64, "Pictures of a request."),
    "max_megapixels": Flag(64, "Pixels of all pictures of a request, in millions, before they are resized."),
    "max_connections": Flag(256, "Requests that are open at once; memory: as many bodies."),
    "read_seconds": Flag(
        30.0, "Time in which a header, then a body must have come, and each part of an answer be taken."
    ),
    "stop_seconds": Flag(120.0, "Time that requests have to be finished once the service is told to stop."),
}


def main(config) -> None:
    """Serves until told to stop."""
    check_installed("the service", "serve", "fastapi", "fastapi_offline", "uvicorn", "python_multipart")
    limits = limits_of(config)
    if not 0 <= config.port < 2**16:
        raise UserError(f"--port={config.port}: must be 0..65535")
    if not config.token.isascii():  # what else a header bears, each client encodes in another way
        raise UserError("--token: must be of ASCII characters only")
    logging.getLogger().setLevel(logging.INFO)
    engine = Engine.load(config)
    code = serve(engine, limits, config)
    if not engine.close(0):
        # A batch is still under way in its thread, where the end of the interpreter would abort the process.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def limits_of(config) -> Limits:
    """Raises UserError, naming the flag, if a limit is below what any request needs."""
    for name in ("max_body_mb", "max_request_pictures", "max_megapixels", "max_connections"):
        if config[name] < 1:
            raise UserError(f"--{name}={config[name]}: must be at least 1")
    for name in ("read_seconds", "stop_seconds"):
        if not 0 < config[name] <= threading.TIMEOUT_MAX:
            raise UserError(f"--{name}={config[name]}: must be above 0, at most {threading.TIMEOUT_MAX:.0f}")
    return Limits(
        body_bytes=config.max_body_mb * 2**20,
        pictures=config.max_request_pictures,
        pixels=config.max_megapixels * 10**6,
        read_seconds=config.read_seconds,
        connections=config.max_connections,
    )


def serve(engine: Engine, limits: Limits, config) -> int:
    """Answers requests until a signal; the exit code: 0 if all that were taken have been answered."""
    import uvicorn

    from evaluation.serving.app import make_app
    from evaluation.serving.limits import impatient

    class Server(uvicorn.Server):
        """Stays there while it stops, to say so to those who come; uvicorn itself would turn deaf."""

        finished = False  # all that were taken: a second signal, or a failed warm-up, ends it before that is known
        stopping = False

        def handle_exit(self, sig, frame):
            if self.stopping:
                self.should_exit = self.force_exit = True
                return
            self.stopping = True
            threading.Thread(target=self.finish, daemon=True).start()  # a signal's handler must not wait

        def finish(self):
            logging.info("stopping: what was taken is finished, new requests are refused")
            self.finished = engine.close(config.stop_seconds)
            self.should_exit = True

        def warmed_up(self, future):
            if not future.cancelled() and future.exception():
                self.stopping = self.should_exit = True

    app = make_app(engine, limits, config.token)
    server = Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            http=impatient(limits),
            server_header=False,
            timeout_graceful_shutdown=int(config.stop_seconds) + 1,  # for answers to reach slow readers
        )
    )
    # The settings of a request that gives none: what others ask for is compiled when the first of them comes.
    engine.warm_up(Settings()).add_done_callback(server.warmed_up)
    with contextlib.suppress(SystemExit):  # uvicorn cannot listen there, and has said so
        server.run()
    return 0 if server.finished else 1


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
