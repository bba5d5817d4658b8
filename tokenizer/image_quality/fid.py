"""FID, the Frechet distance between the features of two sets of images (arXiv 1706.08500).

Shapes: N images, D features of an image. All computations are in float64.
"""

import logging

import numpy as np

NUM_FEATURES = 2048  # D of InceptionV3


class FeatureStatistics:
    """Mean and covariance of a set of feature vectors, accumulated in parts.

    Parts are merged by their means and scatter matrices (Chan, Golub and LeVeque 1979), which avoids cancellation.
    """

    def __init__(self) -> None:
        """Creates the statistics of an empty set."""
        self.count = 0
        self.mean_D: np.ndarray = np.zeros(())
        self._scatter_DD: np.ndarray = np.zeros(())

    @classmethod
    def of(cls, features_ND: np.ndarray) -> "FeatureStatistics":
        """Returns the statistics of N > 0 feature vectors."""
        statistics, features_ND = cls(), np.asarray(features_ND, np.float64)
        statistics.count, statistics.mean_D = len(features_ND), features_ND.mean(axis=0)
        statistics._scatter_DD = (features_ND - statistics.mean_D).T @ (features_ND - statistics.mean_D)
        return statistics

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds the feature vectors of another set, which must not be empty."""
        count, difference_D = self.count + other.count, other.mean_D - self.mean_D
        between_DD = np.multiply.outer(difference_D, difference_D) * (self.count * other.count / count)
        self._scatter_DD = self._scatter_DD + other._scatter_DD + between_DD
        self.mean_D = self.mean_D + difference_D * (other.count / count)
        self.count = count

    @property
    def covariance_DD(self) -> np.ndarray:
        """The unbiased covariance; zero for a single vector."""
        return self._scatter_DD / max(self.count - 1, 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Returns the Frechet distance between the gaussians of two sets of features (arXiv 1706.08500, equation 6).

    `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2)`. The trace of the root is the sum of the roots of the eigenvalues of
    `S1^1/2 S2 S1^1/2`. That matrix is symmetric, so no complex roots appear.
    """
    covariance_DD, other_DD = a.covariance_DD, b.covariance_DD
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    root_DD = (vectors_DD * np.sqrt(np.maximum(values_D, 0))) @ vectors_DD.T
    mixed_D = np.linalg.eigvalsh(root_DD @ other_DD @ root_DD)
    traces = np.trace(covariance_DD) + np.trace(other_DD) - 2 * np.sqrt(np.maximum(mixed_D, 0)).sum()
    return float(np.square(a.mean_D - b.mean_D).sum() + traces)


def warn_if_few(name: str, count: int) -> None:
    """Logs a warning if there are too few images to estimate a gaussian of `NUM_FEATURES` dimensions."""
    if count < NUM_FEATURES:
        logging.warning(
            "%s: FID of %d images, fewer than the %d dimensions of its features: not meaningful",
            name,
            count,
            NUM_FEATURES,
        )
