"""The demo page of a model: run `python -m evaluation.demo`, then open http://127.0.0.1:7860.

Without flags it serves the model that ships with the project, whose images are 32 pixels wide and displayed enlarged.
By default the page is reachable from this machine only; see `--host`. It loads nothing from other hosts.
"""

import os
import pathlib
import signal
import socket
import tempfile
import time

from ml_collections import ConfigDict

from EasyLM.errors import UserError, check_installed
from EasyLM.flags import Flag, run, to_dataclass
from evaluation.page import fields, guard, layout
from evaluation.page.files import LIMITS
from evaluation.page.models import ModelInfo, Models, split_settings
from evaluation.prompting import PrompterSettings, PromptSize, prompt_size, stated_limits
from evaluation.serving import ENGINE_FLAGS, Engine, EngineSettings, exit_process
from evaluation.serving.engine import PAGE_ITEMS
from evaluation.serving.header_check import (
    ALLOWED_HOSTS_FLAG,
    HeaderCheck,
    check_allowed_hosts,
    with_own_host,
)

FLAGS = {
    **ENGINE_FLAGS,
    "checkpoint": Flag(
        str(pathlib.Path(__file__).with_name("demo_model")),
        "The model: PREFIX::PATH, or a Hugging Face directory. A comma list: visitors choose one of them. One is in "
        "memory at a time. --vqgan and --load_llama_config may then be comma lists, too.",
    ),
    "max_batch": Flag(1, "Requests computed in one batch: a power of two. Does not change results.", least=1),
    "host": Flag("127.0.0.1", "Address to listen on; 0.0.0.0: all interfaces of this machine."),
    "allowed_hosts": ALLOWED_HOSTS_FLAG,
    "port": Flag(7860, "Port to listen on.", least=0, most=2**16 - 1),
}


def main(config: ConfigDict) -> None:
    """Serves the page until Ctrl-C or SIGTERM."""
    check_installed("the page", "serve", "gradio")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    allowed_hosts = with_own_host(config.allowed_hosts, config.host)
    check_allowed_hosts(allowed_hosts)
    _check_address(config.host, config.port)
    models = _load_models(to_dataclass(PrompterSettings, config), to_dataclass(EngineSettings, config))
    with tempfile.TemporaryDirectory(prefix="lvm_demo_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(pathlib.Path(folder) / "gradio")  # of uploads
        from starlette.middleware import Middleware

        blocks = layout.build_page(models, pathlib.Path(folder))
        files = guard.PageFiles(pathlib.Path(folder))
        files.sweep()
        stopped: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):  # after both, the files of visitors are removed
            # Shells start background commands with SIGINT ignored, and Python leaves it so.
            signal.signal(number, lambda received, _: stopped.append(received))
        _without_proxy(config.host)
        middleware = [
            Middleware(HeaderCheck, allowed_hosts=allowed_hosts),
            Middleware(guard.PageGuard, files=files, limits=LIMITS),
        ]
        # Each visitor waits in the engine's queue, which is fair, and not in that of gradio.
        blocks.queue(max_size=config.max_queue, default_concurrency_limit=config.max_queue).launch(
            server_name=config.host,
            server_port=config.port or None,
            share=False,
            ssr_mode=False,
            enable_monitoring=False,
            max_file_size=guard.UPLOAD_BYTES,
            max_threads=config.max_queue + 40,
            allowed_paths=[folder],
            footer_links=[],
            css=layout.CSS,
            app_kwargs={"middleware": middleware},
            theme=layout.theme(),
            prevent_thread_lock=True,
            quiet=True,
            _frontend=False,  # gradio would end if its request to this page takes 3 seconds, as on a busy machine
        )
        print(f"The page is at {blocks.local_url}", flush=True)
        while not stopped:
            time.sleep(0.1)
        blocks.close()
        is_idle = models.close(timeout=10)
    exit_process(0, is_idle)


def _check_address(host: str, port: int) -> None:
    """Raises UserError if the page cannot listen at an address. Models take time to load: this is checked before."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: cannot listen there: {error.strerror}") from error


def _without_proxy(host: str) -> None:
    """Lets gradio reach the page itself when the environment names a proxy, as on many clusters."""
    direct = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY", ""), "localhost", host]
    os.environ["no_proxy"] = ",".join(filter(None, direct))


def _load_models(settings: PrompterSettings, engine_settings: EngineSettings) -> Models:
    """Checks all models, and loads the first."""
    by_name = split_settings(settings)
    first, *others = by_name
    sizes = {name: prompt_size(by_name[name]) for name in others}

    def load(name: str) -> Engine:
        engine = Engine.load(by_name[name], engine_settings)
        engine.warm_up(fields.INITIAL_SETTINGS, PAGE_ITEMS)
        return engine

    engine = load(first)
    sizes = {first: PromptSize(engine.resolution, engine.max_prompt_images + 1), **sizes}
    infos = [
        ModelInfo(
            name,
            size.resolution,
            size.max_images - 1,
            engine_settings.max_new_pictures,
            stated_limits(by_name[name].checkpoint),
        )
        for name, size in sizes.items()
    ]
    return Models(infos, load, engine)


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
