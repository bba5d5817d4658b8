"""The Frechet distance equals its definition; statistics of parts equal those of the whole."""

import numpy as np
from scipy.linalg import sqrtm

from tokenizer.image_quality import FeatureStatistics, frechet_distance


def test_frechet_distance_equals_its_definition():
    rng = np.random.default_rng(0)
    a_ND = rng.normal(size=(60, 6)) @ rng.normal(size=(6, 6))
    b_ND = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) + 0.3
    covariances = [np.cov(features, rowvar=False) for features in (a_ND, b_ND)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((a_ND.mean(0) - b_ND.mean(0)) ** 2) + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert expected > 1
    a, b = accumulate(a_ND), accumulate(b_ND)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-8)
    np.testing.assert_allclose(frechet_distance(a, a), 0, atol=1e-9)


def accumulate(features_ND: np.ndarray, *cuts: int) -> FeatureStatistics:
    """Merges the statistics of parts that begin at these rows."""
    statistics = FeatureStatistics()
    for part in np.split(features_ND, cuts):
        statistics.merge(FeatureStatistics.of(part))
    return statistics


def test_statistics_of_parts_equal_those_of_the_whole():
    """Tests float32 features with a mean far above the deviation, also for two merged sets."""
    features_ND = (np.random.default_rng(0).normal(size=(40, 5)) * [1, 2, 3, 4, 5] + 1e4).astype(np.float32)
    merged = accumulate(features_ND[:17], 1, 9)
    merged.merge(accumulate(features_ND[17:], 11))
    for statistics in (accumulate(features_ND), accumulate(features_ND, 1, 2, 30), merged):
        assert statistics.count == 40
        np.testing.assert_allclose(statistics.mean_D, features_ND.mean(axis=0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(
            statistics.covariance_DD, np.cov(features_ND.astype(np.float64), rowvar=False), rtol=1e-9
        )
    assert not accumulate(features_ND[:1]).covariance_DD.any()
