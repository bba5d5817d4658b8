"""The demo page of a model: run `python -m evaluation.demo`, then open http://127.0.0.1:7860.

Without flags it serves the model that ships with the project, whose images are 32 pixels wide and displayed enlarged.
By default the page is reachable from this machine only; see `--host`. It loads nothing from other hosts.
"""

import os
import pathlib
import tempfile

from ml_collections import ConfigDict

from EasyLM.errors import check_installed
from EasyLM.flags import Flag, run, to_dataclass
from evaluation.prompting import PrompterSettings
from evaluation.serving import ENGINE_FLAGS, Engine, EngineSettings, page, page_guard, page_handlers
from evaluation.serving.header_check import (
    ALLOWED_HOSTS_FLAG,
    HeaderCheck,
    check_allowed_hosts,
    with_own_host,
)

FLAGS = {
    **ENGINE_FLAGS,
    "checkpoint": Flag(
        str(pathlib.Path(__file__).with_name("demo_model")), "The model: PREFIX::PATH, or a Hugging Face directory."
    ),
    "max_batch": Flag(1, "Requests computed in one batch: a power of two. Does not change results.", least=1),
    "host": Flag("127.0.0.1", "Address to listen on; 0.0.0.0: all interfaces of this machine."),
    "allowed_hosts": ALLOWED_HOSTS_FLAG,
    "port": Flag(7860, "Port to listen on.", least=0, most=2**16 - 1),
}


def main(config: ConfigDict) -> None:
    """Serves the page until Ctrl-C."""
    check_installed("the page", "serve", "gradio")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    allowed_hosts = with_own_host(config.allowed_hosts, config.host)
    check_allowed_hosts(allowed_hosts)
    engine = Engine.load(to_dataclass(PrompterSettings, config), to_dataclass(EngineSettings, config))
    engine.warm_up(page.INITIAL_SETTINGS)
    with tempfile.TemporaryDirectory(prefix="lvm_demo_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(pathlib.Path(folder) / "gradio")  # of uploads
        from starlette.middleware import Middleware

        blocks = page.build_page(engine, pathlib.Path(folder))
        files = page_guard.PageFiles(pathlib.Path(folder))
        files.sweep()
        middleware = [
            Middleware(HeaderCheck, allowed_hosts=allowed_hosts),
            Middleware(page_guard.PageGuard, files=files, limits=page_handlers.LIMITS),
        ]
        # Each visitor waits in the engine's queue, which is fair, and not in that of gradio.
        blocks.queue(max_size=config.max_queue, default_concurrency_limit=config.max_queue).launch(
            server_name=config.host,
            server_port=config.port or None,
            share=False,
            ssr_mode=False,
            enable_monitoring=False,
            max_file_size=page_handlers.LIMITS.body_bytes,
            max_threads=config.max_queue + 40,
            allowed_paths=[folder],
            footer_links=[],
            css=page.CSS,
            app_kwargs={"middleware": middleware},
        )
        engine.close(timeout=10)


def cli() -> None:
    """Runs the command with the flags of the command line."""
    run(main, FLAGS)


if __name__ == "__main__":
    cli()
