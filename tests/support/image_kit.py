"""Writes image files byte by byte, so that their stored values are known: PNG, TIFF, ICC profiles."""

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import ImageCms

GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG
WHITE_IS_ZERO, BLACK_IS_ZERO = 0, 1  # photometric interpretations of TIFF
# Of ICC profiles: XYZ of red, green and blue, adapted to D50; and functions from signals to light.
SRGB_PRIMARIES = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
P3_PRIMARIES = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
_PARAMETERS = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
SRGB_CURVE = b"para" + bytes(4) + struct.pack(">HH5i", 3, 0, *(round(65536 * value) for value in _PARAMETERS))
LINEAR_CURVE = b"curv" + bytes(8)
CYAN_IN_PROFILE = (130, 200, 180)  # of cmyk_profile, L*a*b* in bytes


def chunk(kind: bytes, data: bytes) -> bytes:
    """Returns a chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pack_bits(samples: np.ndarray, bits: int) -> np.ndarray:
    """Packs the samples [height,...] of each row, the highest bit first: uint8 [height,bytes]."""
    row_bits = samples[..., None] >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(row_bits.reshape(len(samples), -1).astype(np.uint8), axis=1)


def png(samples: np.ndarray, bits: int, colour_type: int = GRAY, *chunks: bytes) -> bytes:
    """Returns a PNG file of samples [height,width] or [height,width,channels], with more chunks before the pixels."""
    rows = b"".join(b"\0" + row.tobytes() for row in pack_bits(samples, bits))
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(samples: np.ndarray, bits: int, photometric: int, tags: Mapping[int, tuple[int, ...]] | None = None) -> bytes:
    """Returns an uncompressed little-endian TIFF file of samples [height,width] or [height,width,channels].

    Args:
      tags: further tags. With tag 284 (PlanarConfiguration) of 2, the channels are stored one after the other.
    """
    tags = dict(tags or {})
    height, width = samples.shape[:2]
    channels = samples.shape[2] if samples.ndim == 3 else 1
    is_planar = tags.get(284) == (2,)
    planes = [samples[..., i] for i in range(channels)] if is_planar else [samples]
    strips = [p.astype("<u2").tobytes() if bits == 16 else pack_bits(p, bits).tobytes() for p in planes]
    strips = [strip + bytes(len(strip) % 2) for strip in strips]
    offsets = 8 + np.cumsum([0, *map(len, strips)])
    tags |= {256: (width,), 257: (height,), 258: (bits,) * channels, 259: (1,), 262: (photometric,)}
    tags |= {273: tuple(offsets[:-1].tolist()), 277: (channels,), 278: (height,), 279: tuple(map(len, strips))}
    data, entries = b"".join(strips), b""
    for tag, values in sorted(tags.items()):
        content = struct.pack(f"<{len(values)}H", *values)
        if len(content) > 4:
            offset, data = 8 + len(data), data + content
            content = struct.pack("<I", offset)
        entries += struct.pack("<HHI4s", tag, 3, len(values), content)  # 3: 16-bit numbers
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def swapped_profile() -> bytes:
    """Returns the sRGB profile with its red and green primaries exchanged, under another name."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


def rgb_profile(primaries: Sequence[Sequence[float]], curve: bytes, name: bytes) -> bytes:
    """Returns a profile of RGB.

    Args:
      primaries: XYZ of red, green and blue, adapted to the white of D50.
      curve: a tag: the function from signals to light.
    """
    tags = {b"desc": _description(name)}
    for letter, xyz in zip((b"r", b"g", b"b"), primaries, strict=True):
        tags[letter + b"XYZ"] = b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * value) for value in xyz))
        tags[letter + b"TRC"] = curve
    return _profile(b"RGB ", b"XYZ ", tags)


def _description(name: bytes) -> bytes:
    text = name + b"\0"
    return b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(8) + bytes(3 + 67)


def _profile(space: bytes, pcs: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    """Returns an ICC profile of version 2, without the required tags that no reader needs."""
    white_point = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"desc": _description(b"test"), b"wtpt": white_point, **tags}
    offset, directory, data = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for signature, content in tags.items():
        directory += signature + struct.pack(">II", offset + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", offset + len(data), b"lcms", 0x02400000, b"prtr", space, pcs)
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + directory + data


def linear_gray_profile() -> bytes:
    """Returns a profile of gray whose values are proportional to light."""
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, 0x0100)})


def cmyk_profile() -> bytes:
    """Returns a profile in which cyan ink is red: a table of 16 ink combinations.

    Combinations with black are black, others with cyan are CYAN_IN_PROFILE, the rest are white.
    """
    white, red, black = (255, 128, 128), CYAN_IN_PROFILE, (0, 128, 128)
    corners = (black if corner % 2 else red if corner >= 8 else white for corner in range(16))
    table = b"".join(map(bytes, corners))  # cyan is the slowest axis, black the fastest
    curve = bytes(range(256))
    identity = b"".join(struct.pack(">i", 65536 * (i % 4 == 0)) for i in range(9))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * curve + table + 3 * curve
    return _profile(b"CMYK", b"Lab ", {b"A2B0": lut, b"A2B1": lut})
