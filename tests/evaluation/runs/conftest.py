"""Fixtures of the evaluation runs."""

import pathlib

import pytest
from prompting_kit import tiny_checkpoint
from runs_kit import write_line_examples


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, str]:
    """The flags of a tiny tokenizer and a tiny model."""
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def lines(tmp_path: pathlib.Path) -> dict[str, str]:
    """The flags of a file of four examples."""
    return write_line_examples(tmp_path)
