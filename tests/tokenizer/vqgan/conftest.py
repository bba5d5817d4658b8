"""A tiny tokenizer, and images for it."""

import numpy as np
import pytest
from tokenizer_kit import TINY, smooth_image, tiny_vqgan


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_vqgan(tmp_path_factory.mktemp("vqgan"))


@pytest.fixture(scope="module")
def pixels():
    return np.stack([smooth_image(100 + seed, TINY.resolution) for seed in range(11)]) / np.float32(255)
