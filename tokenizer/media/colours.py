"""Colours of other primaries and transfer functions, converted to sRGB.

Numbers of colour spaces are those of ITU-T H.273, which image files, video files and FFmpeg use.
"""

import functools
from collections.abc import Sequence

import numpy as np

PQ, HLG = 16, 18  # transfer functions of HDR
UNKNOWN = (2, 3)  # unspecified, reserved
BT2020 = 9  # primaries; also a matrix of YUV
# Transfer functions of standard dynamic range. Screens show them almost as sRGB.
SDR_TRANSFERS = (1, *UNKNOWN, 4, 5, 6, 7, 11, 12, 13, 14, 15)

_D65 = (0.3127, 0.3290)
_SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
_WIDE_PRIMARIES = {  # x and y of red, green, blue and white
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),
    11: (*_P3, (0.314, 0.351)),  # of cinemas
    12: (*_P3, _D65),  # of screens
}
# From XYZ to the responses of the eye's cones, by Bradford, as in ICC profiles: equal steps keep white white.
_CONES = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def check_transfer(number: int) -> None:
    """Raises ValueError if a transfer function is not one of standard dynamic range."""
    if number not in SDR_TRANSFERS:
        raise ValueError(f"its transfer function (number {number} of H.273) is not supported")


@functools.cache
def wide_to_srgb(primaries: int) -> np.ndarray | None:
    """Returns the matrix [3,3] from linear RGB of wide primaries to that of sRGB; None: the primaries are not wide."""
    chromaticities = _WIDE_PRIMARIES.get(primaries)
    return None if chromaticities is None else primaries_to_srgb(*chromaticities)


def primaries_to_srgb(
    red: Sequence[float], green: Sequence[float], blue: Sequence[float], white: Sequence[float]
) -> np.ndarray:
    """Returns the matrix [3,3] from linear RGB of primaries to that of sRGB. White becomes white.

    Args:
      red, green, blue, white: chromaticities x, y.

    Raises:
      ValueError: if they do not span a plane of colours.
    """
    try:
        with np.errstate(divide="raise", invalid="raise"):
            cones_of_white, cones_of_d65 = _CONES @ _xyz(white), _CONES @ _xyz(_D65)
            adaptation = np.linalg.solve(_CONES, np.diag(cones_of_d65 / cones_of_white) @ _CONES)
            return np.linalg.solve(_to_xyz(*_SRGB, white=_D65), adaptation @ _to_xyz(red, green, blue, white=white))
    except (np.linalg.LinAlgError, FloatingPointError) as error:
        raise ValueError(f"its primaries do not span a plane of colours ({error})") from error


def _to_xyz(red: Sequence[float], green: Sequence[float], blue: Sequence[float], white: Sequence[float]) -> np.ndarray:
    """Returns the matrix [3,3] from linear RGB to XYZ, by SMPTE RP 177."""
    xyz = np.stack([_xyz(red), _xyz(green), _xyz(blue)], axis=1)
    return xyz * np.linalg.solve(xyz, _xyz(white))


def _xyz(chromaticity: Sequence[float]) -> np.ndarray:
    """Returns the XYZ of a chromaticity with Y = 1."""
    x, y = np.float64(chromaticity[0]), np.float64(chromaticity[1])
    return np.array([x / y, 1, (1 - x - y) / y])


def srgb_light(signal: np.ndarray) -> np.ndarray:
    """Returns the light of sRGB signals, both in [0, 1]."""
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def srgb_signal(light: np.ndarray) -> np.ndarray:
    """Returns the sRGB signals of light, clipped to [0, 1]."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
