"""A fixture of tests that use a compilation cache."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture
def forgets_the_cache():
    """The cache is a setting of the process."""
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
