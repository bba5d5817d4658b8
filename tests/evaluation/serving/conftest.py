"""Fixtures of the serving tests."""

import pytest
from serve_kit import LIMITS, SECONDS, tiny_engine

from evaluation.serving.app import make_app


@pytest.fixture(scope="module")
def engine():
    engine = tiny_engine()
    yield engine
    engine.close(SECONDS)


@pytest.fixture(scope="module")
def app(engine):
    return make_app(engine, LIMITS)
