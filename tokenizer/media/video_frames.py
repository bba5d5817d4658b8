"""Decoded video frames to RGB pixels: fields, colour matrix and range, HDR and wide colours to sRGB, orientation.

Numbers of colour spaces are those of ITU-T H.273, which FFmpeg and all containers use.
"""

import fractions
from typing import Any

import numpy as np
from PIL import Image

from tokenizer.media import colours, images
from tokenizer.media.video_file import MAX_PIXELS, import_av, to_array

_BT709, _BT601 = 1, 6  # matrices
_MATRICES = (0, _BT709, *colours.UNKNOWN, 4, 5, _BT601, 7, colours.BT2020)  # those that swscale converts to RGB
_LIMITED = 1  # FFmpeg's number of the range in which black is 16 and white is 235
_FROM_LIMITED = np.clip(np.round((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)
_WHITE_NITS = 203  # HDR white of ITU-R BT.2408, which becomes the white of sRGB; brighter light is clipped
_HLG_PEAK_NITS, _HLG_GAMMA = 1000, 1.2  # the reference display of ITU-R BT.2100


def to_bytes(frame: Any, size: int | None, pixel_aspect: fractions.Fraction = fractions.Fraction(1)) -> np.ndarray:
    """Converts a frame of PyAV to upright sRGB, resized as `images.read` does: uint8 [height,width,3].

    Untagged YUV has the matrix of BT.2020 if it is HDR, of BT.709 if it has HD size, otherwise of BT.601. HDR white
    becomes white. Frames with an alpha channel are composited over white. An interlaced frame is its first field.

    Args:
      frame: the frame.
      size: the side of the result. None: the size at which the frame is shown.
      pixel_aspect: width by height of the stored pixels. Not square ones are enlarged in one direction.

    Raises:
      ValueError: if a colour matrix or transfer function is not supported, or the frame would be shown too large.
    """
    matrix = display_matrix(frame)
    if frame.interlaced_frame:
        frame = first_field(frame)
    width_height = (size, size) if size is not None else _shown_size(frame, pixel_aspect)
    is_hdr = frame.color_trc in (colours.PQ, colours.HLG)
    is_yuv = len(frame.format.components) >= 3 and not frame.format.is_rgb
    if is_yuv and frame.colorspace in colours.UNKNOWN:
        is_hd = frame.width >= 1280 or frame.height > 576
        frame.colorspace = colours.BT2020 if is_hdr else _BT709 if is_hd else _BT601
    if is_yuv and frame.colorspace not in _MATRICES:
        raise ValueError(f"its colour matrix (number {frame.colorspace} of H.273) is not supported")
    if not is_hdr:
        colours.check_transfer(frame.color_trc)
    primaries = frame.color_primaries
    primaries = colours.BT2020 if is_hdr and primaries in colours.UNKNOWN else primaries
    to_srgb_33 = colours.wide_to_srgb(primaries)
    if is_hdr or to_srgb_33 is not None:
        pixels_HW3 = _resize(to_array(frame, format="gbrp16le").astype(np.float32) / 65535, width_height)
        return upright(images.to_uint8(_to_srgb(pixels_HW3, frame.color_trc, to_srgb_33)), matrix)
    has_alpha = any(component.is_alpha for component in frame.format.components)
    pixels = to_array(frame, format="rgba" if has_alpha else "rgb24")
    if frame.format.name.startswith(("gray", "ya")) and frame.color_range == _LIMITED:  # swscale takes it for full
        pixels = np.concatenate([_FROM_LIMITED[pixels[..., :3]], pixels[..., 3:]], axis=-1)
    image = Image.fromarray(pixels)
    if has_alpha:
        image = images.over_white(image)
    if image.size != width_height:
        image = image.resize(width_height, Image.Resampling.BICUBIC)
    return upright(np.asarray(image), matrix)


def first_field(frame: Any) -> Any:
    """Returns an interlaced frame with the lines of its first field, and interpolated lines between them.

    A frame is shown from the time of its first field. Its other field shows a later moment. FFmpeg's `estdif` looks at
    this frame alone, so that the result does not depend on where decoding began.
    """
    graph = import_av().filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=fractions.Fraction(1, 1000)
    )
    graph.link_nodes(source, graph.add("estdif", "mode=frame:deint=all"), graph.add("buffersink")).configure()
    graph.push(frame)
    graph.push(None)
    return graph.pull()


def _shown_size(frame: Any, pixel_aspect: fractions.Fraction) -> tuple[int, int]:
    """Returns the width and height at which a frame is shown, before it is turned."""
    width, height = frame.width, frame.height
    width, height = (round(width * pixel_aspect), height) if pixel_aspect > 1 else (width, round(height / pixel_aspect))
    if width * height > MAX_PIXELS:
        raise ValueError(f"is shown at {width}x{height} pixels, more than {MAX_PIXELS}")
    return width, height


def _resize(pixels_HW3: np.ndarray, width_height: tuple[int, int]) -> np.ndarray:
    if pixels_HW3.shape[1::-1] == width_height:
        return pixels_HW3
    channels = [Image.fromarray(channel) for channel in pixels_HW3.transpose(2, 0, 1)]
    resized = [np.asarray(channel.resize(width_height, Image.Resampling.BICUBIC)) for channel in channels]
    return np.clip(np.stack(resized, axis=-1), 0, 1)


def _to_srgb(signal_HW3: np.ndarray, transfer: int, to_srgb_33: np.ndarray | None) -> np.ndarray:
    """Converts RGB of a transfer function to sRGB, all in [0, 1], by the matrix of its primaries if they are wide."""
    decode = {colours.PQ: _pq_light, colours.HLG: _hlg_light}.get(transfer, colours.srgb_light)
    light_HW3 = decode(signal_HW3.astype(np.float64))
    if to_srgb_33 is not None:
        light_HW3 = light_HW3 @ to_srgb_33.T
    return colours.srgb_signal(light_HW3).astype(np.float32)


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
