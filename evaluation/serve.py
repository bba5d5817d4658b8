"""The HTTP service of a model: `python -m evaluation.serve --checkpoint=C --vqgan=V --port=8000`.

`http://127.0.0.1:8000/docs` documents it. By default it is reachable from this machine only; see `--host`. SIGTERM or
Ctrl-C stops it: new requests are refused and accepted requests are finished. The exit code is 0, or 1 if this takes
longer than `--stop_seconds`. A second signal stops it at once. `EasyLM.models.llama.llama_serve` is an alias.
"""

import logging
import threading

from ml_collections import ConfigDict

from EasyLM.errors import UserError, check_installed
from EasyLM.flags import Flag, run, to_dataclass
from evaluation.prompting import PrompterSettings
from evaluation.serving import ENGINE_FLAGS, Engine, EngineSettings, Limits, exit_process
from evaluation.serving.header_check import ALLOWED_HOSTS_FLAG, check_allowed_hosts

FLAGS = {
    **ENGINE_FLAGS,
    "host": Flag("127.0.0.1", "Address to listen on; 0.0.0.0: all interfaces of this machine."),
    "port": Flag(8000, "Port to listen on.", least=0, most=2**16 - 1),
    "token": Flag(
        "", "Bearer token that POST requests must send; '$NAME' reads it from the environment. Empty: no authorization."
    ),
    "allowed_hosts": ALLOWED_HOSTS_FLAG,
    "max_body_mb": Flag(16, "Largest request body, in MiB.", least=1),
    "max_request_pictures": Flag(64, "Largest number of images of a request.", least=1),
    "max_megapixels": Flag(
        64, "Largest total of pixels in the images of a request, in millions, before resizing.", least=1
    ),
    "max_connections": Flag(256, "Largest number of open requests. Each may hold a body in memory.", least=1),
    "read_seconds": Flag(
        30.0,
        "Timeout of the header, of the body, and of the client for reading each part of a response.",
        above=0,
        most=threading.TIMEOUT_MAX,
    ),
    "stop_seconds": Flag(120.0, "Timeout of accepted requests after a signal.", above=0, most=threading.TIMEOUT_MAX),
}


def main(config: ConfigDict) -> None:
    """Serves until a signal."""
    check_installed("the service", "serve", "fastapi", "fastapi_offline", "uvicorn", "python_multipart")
    from evaluation.serving.server import ServerSettings, run_server

    if not config.token.isascii():  # clients encode other characters of a header in different ways
        raise UserError("--token: must consist of ASCII characters")
    check_allowed_hosts(config.allowed_hosts)
    logging.getLogger().setLevel(logging.INFO)
    limits = Limits(
        body_bytes=config.max_body_mb * 2**20,
        images=config.max_request_pictures,
        pixels=config.max_megapixels * 10**6,
        read_seconds=config.read_seconds,
        connections=config.max_connections,
    )
    engine = Engine.load(to_dataclass(PrompterSettings, config), to_dataclass(EngineSettings, config))
    code = run_server(engine, limits, to_dataclass(ServerSettings, config))
    exit_process(code, engine.close(0))


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
