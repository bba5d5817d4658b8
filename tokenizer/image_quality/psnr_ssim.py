"""Mean squared error, PSNR and SSIM of images against references, in float64.

Shapes: B images, H W pixels, C channels. Images are in [0, 1].
"""

import numpy as np

from EasyLM.errors import UserError

WINDOW, SIGMA = 11, 1.5  # of SSIM's gaussian weights, in pixels
_K1, _K2 = 0.01, 0.03
_MIN_MSE = 1e-10  # a PSNR of 100 dB


def mse(images_BHWC: np.ndarray, references_BHWC: np.ndarray) -> np.ndarray:
    """Returns the mean squared error of each image, [B]."""
    assert images_BHWC.shape == references_BHWC.shape, (images_BHWC.shape, references_BHWC.shape)
    return np.square(np.asarray(images_BHWC, np.float64) - references_BHWC).mean(axis=(1, 2, 3))


def psnr(images_BHWC: np.ndarray, references_BHWC: np.ndarray) -> np.ndarray:
    """Returns the peak signal-to-noise ratio of each image in dB, [B]; at most 100, the value of equal images."""
    return -10 * np.log10(np.maximum(mse(images_BHWC, references_BHWC), _MIN_MSE))


def ssim(images_BHWC: np.ndarray, references_BHWC: np.ndarray) -> np.ndarray:
    """Returns the structural similarity of each image (Wang et al. 2004), the mean over pixels and channels, [B].

    The weights are a gaussian of 11x11 pixels, sigma 1.5. As in the paper, windows lie inside the image. The result
    equals scikit-image's with gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.

    Raises:
      UserError: if the images are smaller than a window.
    """
    assert images_BHWC.shape == references_BHWC.shape, (images_BHWC.shape, references_BHWC.shape)
    if min(images_BHWC.shape[1:3]) < WINDOW:
        raise UserError(f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels, not {images_BHWC.shape[1:3]}")
    x, y = np.asarray(images_BHWC, np.float64), np.asarray(references_BHWC, np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    variances = _blur(x * x) + _blur(y * y) - mean_x**2 - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    structure = (2 * covariance + _K2**2) / (variances + _K2**2)
    luminance = (2 * mean_x * mean_y + _K1**2) / (mean_x**2 + mean_y**2 + _K1**2)
    return (structure * luminance).mean(axis=(1, 2, 3))


def _blur(x_BHWC: np.ndarray) -> np.ndarray:
    """Returns the gaussian means of all windows inside the image: [B, H-10, W-10, C]."""
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    weights /= weights.sum()
    height, width = (extent - WINDOW + 1 for extent in x_BHWC.shape[1:3])
    rows = sum(weight * x_BHWC[:, i : i + height] for i, weight in enumerate(weights))
    return sum(weight * rows[:, :, i : i + width] for i, weight in enumerate(weights))
