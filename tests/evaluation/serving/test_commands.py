"""The command lines of the service and the page."""

import importlib.util
import socket
import sys

import pytest
from tokenizer_kit import run_main

from EasyLM import flags
from EasyLM.errors import UserError
from evaluation import demo, serve


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("max_batch", 3, "--max_batch=3: must be a power of two"),
        ("max_queue", 0, "--max_queue=0: must be at least 1"),
        ("warm_up", "x", "--warm_up=x: must be a comma list"),
        ("warm_up", "3,0", "--warm_up=3,0: each length must be at least 1"),
        ("max_body_mb", 0, "--max_body_mb=0"),
        ("read_seconds", 0.0, "--read_seconds=0.0"),
        ("stop_seconds", float("inf"), "--stop_seconds=inf"),
        ("port", 70000, "--port=70000"),
        ("token", "sésame", "--token: must consist of ASCII characters"),
    ],
)
def test_wrong_flags_are_named_before_the_model_is_loaded(flag, value, message):
    with pytest.raises(UserError) as error:
        run_main(serve, **{"checkpoint": "none", flag: value})
    assert message in str(error.value)


@pytest.mark.parametrize("program, package", [(serve, "uvicorn"), (demo, "gradio")])
def test_missing_packages_are_named_before_the_model_is_loaded(monkeypatch, program, package):
    monkeypatch.setitem(sys.modules, package, None)
    config = flags.defaults(program.FLAGS)
    config.checkpoint = "none"
    with pytest.raises(UserError, match=rf"needs the package {package}: pip install -e '\.\[serve\]'"):
        program.main(config)


@pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="needs gradio")
def test_a_port_in_use_is_named_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--host=127.0.0.1 --port={port}: cannot listen there: Address already"):
            run_main(demo, checkpoint="none", port=port)
    with pytest.raises(UserError, match=r"--host=203\.0\.113\.1 --port=7860: cannot listen there"):
        run_main(demo, checkpoint="none", host="203.0.113.1")
