"""PSNR and SSIM equal those of scikit-image."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from EasyLM.errors import UserError
from tokenizer.image_quality import psnr, ssim
from tokenizer.synthetic import photos


@pytest.fixture(scope="module")
def pairs():
    """Photographs with different degradations, and the originals: two arrays [4,40,48,3]."""
    originals = np.stack([photos.crop(seed, 48)[:40] for seed in range(4)]) / 255
    noise = np.random.default_rng(0).normal(size=originals.shape)
    degraded = [
        originals[0] + 0.1 * noise[0],
        0.5 * originals[1],
        np.roll(originals[2], 1, axis=1),
        1 - originals[3],
    ]
    return np.clip(degraded, 0, 1).astype(np.float32), originals.astype(np.float32)


def test_ssim_equals_scikit_image(pairs):
    expected = [
        structural_similarity(
            *pair, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=-1
        )
        for pair in zip(*pairs)
    ]
    assert max(expected) - min(expected) > 0.3
    np.testing.assert_allclose(ssim(*pairs), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ssim(pairs[1], pairs[1]), 1, rtol=1e-12)


def test_psnr_equals_scikit_image(pairs):
    expected = [peak_signal_noise_ratio(original, image, data_range=1) for image, original in zip(*pairs)]
    np.testing.assert_allclose(psnr(*pairs), expected, rtol=1e-5)
    np.testing.assert_array_equal(psnr(pairs[0], pairs[0]), 100)


def test_ssim_rejects_images_smaller_than_a_window():
    with pytest.raises(UserError, match="at least 11x11"):
        ssim(np.zeros((1, 10, 16, 3)), np.zeros((1, 10, 16, 3)))
