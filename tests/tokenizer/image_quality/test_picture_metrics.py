"""PSNR and SSIM are scikit-image's; the distance of FID is that of the matrix square root."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from EasyLM.errors import UserError
from tokenizer.image_quality import metrics
from tokenizer.synthetic import photos


@pytest.fixture(scope="module")
def pairs():
    """Photographs and the same ones spoilt, each in another way: two arrays [4,40,48,3]."""
    truths = np.stack([photos.crop(seed, 48)[:40] for seed in range(4)]) / 255
    noise = np.random.default_rng(0).normal(size=truths.shape)
    spoilt = [truths[0] + 0.1 * noise[0], 0.5 * truths[1], np.roll(truths[2], 1, axis=1), 1 - truths[3]]
    return np.clip(spoilt, 0, 1).astype(np.float32), truths.astype(np.float32)


def test_ssim_is_scikit_images(pairs):
    expected = [
        structural_similarity(
            *pair, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=-1
        )
        for pair in zip(*pairs)
    ]
    assert max(expected) - min(expected) > 0.3
    np.testing.assert_allclose(metrics.ssim(*pairs), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(metrics.ssim(pairs[1], pairs[1]), 1, rtol=1e-12)


def test_psnr_is_scikit_images(pairs):
    expected = [peak_signal_noise_ratio(truth, picture, data_range=1) for picture, truth in zip(*pairs)]
    np.testing.assert_allclose(metrics.psnr(*pairs), expected, rtol=1e-5)
    np.testing.assert_array_equal(metrics.psnr(pairs[0], pairs[0]), 100)


def test_ssim_of_too_small_pictures_is_refused():
    with pytest.raises(UserError, match="at least 11x11"):
        metrics.ssim(np.zeros((1, 10, 16, 3)), np.zeros((1, 10, 16, 3)))


def test_frechet_distance_is_that_of_the_matrix_root():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6))
    other = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) + 0.3
    covariances = [np.cov(features, rowvar=False) for features in (one, other)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((one.mean(0) - other.mean(0)) ** 2) + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert expected > 1
    one, other = gaussian(one), gaussian(other)
    np.testing.assert_allclose(metrics.frechet_distance(one, other), expected, rtol=1e-8)
    np.testing.assert_allclose(metrics.frechet_distance(one, one), 0, atol=1e-9)


def gaussian(features, *cuts: int) -> metrics.Gaussian:
    """Of features that come in parts, cut at these rows."""
    found = metrics.Gaussian()
    for part in np.split(features, cuts):
        found.join(metrics.Gaussian.of(part))
    return found


def test_a_gaussian_of_parts_is_that_of_the_whole():
    """Also where the mean is large beside the deviation, in float32, and where the gaussians of two sets are joined."""
    features = (np.random.default_rng(0).normal(size=(40, 5)) * [1, 2, 3, 4, 5] + 1e4).astype(np.float32)
    joined = gaussian(features[:17], 1, 9)
    joined.join(gaussian(features[17:], 11))
    for found in (gaussian(features), gaussian(features, 1, 2, 30), joined):
        assert found.count == 40
        np.testing.assert_allclose(found.mean_D, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(found.covariance_DD, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9)
    assert not gaussian(features[:1]).covariance_DD.any()
