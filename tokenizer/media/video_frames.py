"""Decoded video frames to RGB pixels: colour matrix and range, HDR and wide colours to sRGB, orientation.

Numbers of colour spaces are those of ITU-T H.273, which FFmpeg and all containers use.
"""

from typing import Any

import numpy as np
from PIL import Image

from tokenizer.media import images

_UNKNOWN = (2, 3)  # unspecified, reserved
_BT709, _BT601, _BT2020 = 1, 6, 9  # matrices; the last one also primaries
_MATRICES = (0, _BT709, *_UNKNOWN, 4, 5, _BT601, 7, _BT2020)  # those that swscale converts to RGB
_PQ, _HLG = 16, 18
# Transfer functions of standard dynamic range. Screens show them almost as sRGB.
_SDR_TRANSFERS = (1, *_UNKNOWN, 4, 5, 6, 7, 11, 12, 13, 14, 15)
# From linear light of wide primaries to that of sRGB: BT.2020 (matrix of ITU-R BT.2087) and P3 with a D65 white.
_TO_SRGB_PRIMARIES = {
    _BT2020: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    12: ((1.2249, -0.2247, 0.0), (-0.0420, 1.0419, 0.0), (-0.0197, -0.0786, 1.0979)),
}
_WHITE_NITS = 203  # HDR white of ITU-R BT.2408, which becomes the white of sRGB; brighter light is clipped
_HLG_PEAK_NITS, _HLG_GAMMA = 1000, 1.2  # the reference display of ITU-R BT.2100


def to_pixels(frame: Any, size: int | None) -> np.ndarray:
    """Converts a frame of PyAV to upright sRGB, resized as `images.read` does: float32 [height,width,3] in [0, 1].

    Untagged YUV has the matrix of BT.2020 if it is HDR, of BT.709 if it has HD size, otherwise of BT.601. HDR white
    becomes white. Frames with an alpha channel are composited over white.

    Raises:
      ValueError: if a colour matrix or transfer function is not supported.
    """
    is_hdr = frame.color_trc in (_PQ, _HLG)
    is_yuv = len(frame.format.components) >= 3 and not frame.format.is_rgb
    if is_yuv and frame.colorspace in _UNKNOWN:
        is_hd = frame.width >= 1280 or frame.height > 576
        frame.colorspace = _BT2020 if is_hdr else _BT709 if is_hd else _BT601
    if is_yuv and frame.colorspace not in _MATRICES:
        raise ValueError(f"its colour matrix (number {frame.colorspace} of H.273) is not supported")
    if not is_hdr and frame.color_trc not in _SDR_TRANSFERS:
        raise ValueError(f"its transfer function (number {frame.color_trc} of H.273) is not supported")
    primaries = _BT2020 if is_hdr and frame.color_primaries in _UNKNOWN else frame.color_primaries
    if is_hdr or primaries in _TO_SRGB_PRIMARIES:
        pixels_HW3 = _resize(frame.to_ndarray(format="gbrp16le").astype(np.float32) / 65535, size)
        return upright(_to_srgb(pixels_HW3, frame.color_trc, primaries), display_matrix(frame))
    has_alpha = any(component.is_alpha for component in frame.format.components)
    image = Image.fromarray(frame.to_ndarray(format="rgba" if has_alpha else "rgb24"))
    return upright(images.to_pixels(image, size), display_matrix(frame))


def _resize(pixels_HW3: np.ndarray, size: int | None) -> np.ndarray:
    if size is None:
        return pixels_HW3
    channels = [Image.fromarray(channel) for channel in pixels_HW3.transpose(2, 0, 1)]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    return np.clip(np.stack(resized, axis=-1), 0, 1)


def _to_srgb(signal_HW3: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Converts RGB of a transfer function and primaries to sRGB, all in [0, 1]."""
    decode = {_PQ: _pq_light, _HLG: _hlg_light}.get(transfer, _srgb_light)
    light_HW3 = decode(signal_HW3.astype(np.float64))
    if primaries in _TO_SRGB_PRIMARIES:
        light_HW3 = light_HW3 @ np.array(_TO_SRGB_PRIMARIES[primaries]).T
    light_HW3 = np.clip(light_HW3, 0, 1)
    signal_HW3 = np.where(light_HW3 <= 0.0031308, 12.92 * light_HW3, 1.055 * light_HW3 ** (1 / 2.4) - 0.055)
    return signal_HW3.astype(np.float32)


def _srgb_light(signal: np.ndarray) -> np.ndarray:
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def _pq_light(signal: np.ndarray) -> np.ndarray:
    """Returns light relative to HDR white, by the EOTF of SMPTE ST 2084."""
    power = signal ** (32 / 2523)
    light = (np.maximum(power - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * power)) ** (8192 / 1305)
    return light * 10_000 / _WHITE_NITS


def _hlg_light(signal_HW3: np.ndarray) -> np.ndarray:
    """Returns light relative to HDR white, by the inverse OETF and the OOTF of ITU-R BT.2100."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene_HW3 = np.where(signal_HW3 <= 0.5, signal_HW3**2 / 3, (np.exp((signal_HW3 - c) / a) + b) / 12)
    luminance_HW1 = scene_HW3 @ np.array([[0.2627], [0.6780], [0.0593]])
    return scene_HW3 * luminance_HW1 ** (_HLG_GAMMA - 1) * _HLG_PEAK_NITS / _WHITE_NITS


def display_matrix(frame: Any) -> tuple[float, float, float, float]:
    """Returns (a, b, c, d): a stored pixel (x, y) is shown at (ax + cy, bx + dy), apart from a shift."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV cannot list side data if one of them is of a kind that it does not know
        angle = np.radians(frame.rotation)  # counterclockwise
        return np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    if data is None:
        return 1.0, 0.0, 0.0, 1.0
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()
    return a, b, c, d


def upright(pixels_HWC: np.ndarray, matrix: tuple[float, float, float, float]) -> np.ndarray:
    """Applies the nearest of the eight mirrorings and rotations by right angles."""
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels_HWC, mirror_x, mirror_y = pixels_HWC.swapaxes(0, 1), c < 0, b < 0
    else:
        mirror_x, mirror_y = a < 0, d < 0
    return np.ascontiguousarray(pixels_HWC[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1])
