"""Figures of pictures against the truth: PSNR, SSIM, and the distance of FID between two sets of features.

Shapes: B pictures, H W pixels, C channels, D length of a feature. Pictures are in [0, 1]; all is computed in float64.
"""

import numpy as np

from EasyLM.errors import UserError

WINDOW, SIGMA = 11, 1.5  # of SSIM's weights, in pixels
_K1, _K2 = 0.01, 0.03


def psnr(pictures_BHWC: np.ndarray, truths_BHWC: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture in dB; 100 where the two are equal. Shape [B]."""
    assert pictures_BHWC.shape == truths_BHWC.shape, (pictures_BHWC.shape, truths_BHWC.shape)
    squared_B = np.square(np.asarray(pictures_BHWC, np.float64) - truths_BHWC).mean(axis=(1, 2, 3))
    return -10 * np.log10(np.maximum(squared_B, 1e-10))


def ssim(pictures_BHWC: np.ndarray, truths_BHWC: np.ndarray) -> np.ndarray:
    """Structural similarity of each picture: Wang et al. 2004, the mean over pixels and channels. Shape [B].

    The weights are a gaussian of 11 x 11 pixels, sigma 1.5; only windows that lie within the picture count, as in the
    paper. (In scikit-image: gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.)

    Raises:
      UserError: for pictures smaller than a window.
    """
    assert pictures_BHWC.shape == truths_BHWC.shape, (pictures_BHWC.shape, truths_BHWC.shape)
    if min(pictures_BHWC.shape[1:3]) < WINDOW:
        raise UserError(f"SSIM needs pictures of at least {WINDOW}x{WINDOW} pixels, not {pictures_BHWC.shape[1:3]}")
    x, y = np.asarray(pictures_BHWC, np.float64), np.asarray(truths_BHWC, np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    variances = _blur(x * x) + _blur(y * y) - mean_x**2 - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    structure = (2 * covariance + _K2**2) / (variances + _K2**2)
    luminance = (2 * mean_x * mean_y + _K1**2) / (mean_x**2 + mean_y**2 + _K1**2)
    return (structure * luminance).mean(axis=(1, 2, 3))


def _blur(x_BHWC: np.ndarray) -> np.ndarray:
    """Gaussian means of all windows within the picture: [B, H-10, W-10, C]."""
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    weights /= weights.sum()
    height, width = (extent - WINDOW + 1 for extent in x_BHWC.shape[1:3])
    rows = sum(weight * x_BHWC[:, i : i + height] for i, weight in enumerate(weights))
    return sum(weight * rows[:, :, i : i + width] for i, weight in enumerate(weights))


class Gaussian:
    """Mean and covariance of features that come in parts, in the memory of one part and of D x D numbers.

    Parts are joined by their means and scatters (Chan, Golub and LeVeque 1979), so that nothing cancels.
    """

    def __init__(self):
        """Of no features yet: the first ones say how long they are."""
        self.count, self.mean_D, self._scatter_DD = 0, np.zeros(()), np.zeros(())

    @classmethod
    def of(cls, features_ND: np.ndarray) -> "Gaussian":
        """Of these N features, N > 0."""
        found, features_ND = cls(), np.asarray(features_ND, np.float64)
        found.count, found.mean_D = len(features_ND), features_ND.mean(axis=0)
        found._scatter_DD = (features_ND - found.mean_D).T @ (features_ND - found.mean_D)
        return found

    def join(self, other: "Gaussian") -> None:
        """Takes in all features of another, which has some."""
        count, apart_D = self.count + other.count, other.mean_D - self.mean_D
        between_DD = np.multiply.outer(apart_D, apart_D) * (self.count * other.count / count)
        self._scatter_DD = self._scatter_DD + other._scatter_DD + between_DD
        self.mean_D = self.mean_D + apart_D * (other.count / count)
        self.count = count

    @property
    def covariance_DD(self) -> np.ndarray:
        """Without bias; 0 of a single feature."""
        return self._scatter_DD / max(self.count - 1, 1)


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Distance between the gaussians of two sets of features (FID, arXiv 1706.08500, equation 6).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2). The last trace is the sum of the roots of the eigenvalues of
    S1^1/2 S2 S1^1/2, which is symmetric, so that no complex root appears.
    """
    covariance_DD, other_DD = one.covariance_DD, other.covariance_DD
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    root_DD = (vectors_DD * np.sqrt(np.maximum(values_D, 0))) @ vectors_DD.T
    mixed_D = np.linalg.eigvalsh(root_DD @ other_DD @ root_DD)
    traces = np.trace(covariance_DD) + np.trace(other_DD) - 2 * np.sqrt(np.maximum(mixed_D, 0)).sum()
    return float(np.square(one.mean_D - other.mean_D).sum() + traces)
