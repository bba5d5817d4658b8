"""Fixtures of the build tests: a tiny tokenizer and inputs for every kind."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import pytest
from build_kit import load_codec, write_inputs
from tokenizer_kit import tiny_vqgan, write_image

from tokenizer.builders.code_cache import CodeCache
from tokenizer.vqgan import Codec


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """The folder of a tiny tokenizer."""
    return tiny_vqgan(tmp_path_factory.mktemp("vqgan"))


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> pathlib.Path:
    """A small input for every kind. Tests must not change it."""
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root)
    return root


@pytest.fixture(autouse=True)
def load_codecs_once(monkeypatch) -> None:
    """Makes builds use a cached codec."""
    monkeypatch.setattr(Codec, "from_flags", lambda flags: load_codec(flags.vqgan, flags.dtype, flags.batch_size))


@pytest.fixture
def make_cache(tmp_path) -> Iterator[Callable[[int], CodeCache]]:
    """Makes caches of a capacity for images of four codes; closes them after the test."""
    with contextlib.ExitStack() as caches:
        yield lambda capacity: caches.enter_context(contextlib.closing(CodeCache(capacity, 4, str(tmp_path))))


@pytest.fixture
def codec(tiny) -> Codec:
    """The codec of the tiny tokenizer."""
    return load_codec(tiny, "fp32", 8)


@pytest.fixture
def pairs(tmp_path) -> pathlib.Path:
    """Five images with labels. Tests may change them."""
    for i in range(5):
        write_image(tmp_path / "image" / f"{i}.png", i)
        write_image(tmp_path / "label" / f"{i}.png", 100 + i)
    return tmp_path
