"""The rules that judge an image by itself: a function (measurement) -> whether it is dropped, by its reason."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from EasyLM.errors import UserError
from EasyLM.storage import read_text_lines

Rule = Callable[[Mapping[str, Any]], bool]
_HEX = re.compile(r"[0-9a-f]+")
_KINDS = {32: "md5", 64: "sha256"}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of an image's measurements. 0, or no score: no limit.

    Attributes:
      min_side: of its shorter side, in pixels.
      max_aspect_ratio: of the longer side over the shorter one.
      min_bytes_per_pixel: of the file's size over the number of pixels.
      min_contrast: of the standard deviation of its luminance (0 to 255), at 32x32 pixels.
      minimum: the least value of scores; a score that an image lacks is below it.
      maximum: the greatest value of scores; a score that an image lacks is above it.
    """

    min_side: int
    max_aspect_ratio: float
    min_bytes_per_pixel: float
    min_contrast: float
    minimum: Mapping[str, float]
    maximum: Mapping[str, float]


def make_rules(limits: Limits) -> dict[str, Rule]:
    """Returns the rules by their reasons."""
    rules: dict[str, Rule] = {}
    if limits.min_side:
        rules[f"--min_side={limits.min_side}"] = lambda m: min(m["width"], m["height"]) < limits.min_side
    if limits.max_aspect_ratio:
        rules[f"--max_aspect_ratio={limits.max_aspect_ratio:g}"] = lambda m: (
            max(m["width"], m["height"]) > limits.max_aspect_ratio * min(m["width"], m["height"])
        )
    if limits.min_bytes_per_pixel:
        rules[f"--min_bytes_per_pixel={limits.min_bytes_per_pixel:g}"] = lambda m: (
            m["bytes"] < limits.min_bytes_per_pixel * m["width"] * m["height"]
        )
    if limits.min_contrast:
        rules[f"--min_contrast={limits.min_contrast:g}"] = lambda m: m["contrast"] < limits.min_contrast
    for name, least in limits.minimum.items():
        rules[f"--min={name}:{least:g}"] = _below(name, least)
    for name, most in limits.maximum.items():
        rules[f"--max={name}:{most:g}"] = _above(name, most)
    return rules


def _below(name: str, least: float) -> Rule:
    return lambda m: m["scores"][name] is None or m["scores"][name] < least


def _above(name: str, most: float) -> Rule:
    return lambda m: m["scores"][name] is None or m["scores"][name] > most


@dataclasses.dataclass(frozen=True)
class Blocklist:
    """Hashes of images that must not be used.

    Attributes:
      contents: MD5 and SHA-256 of files, as bytes.
      perceptual: perceptual hashes.
    """

    contents: frozenset[bytes] = frozenset()
    perceptual: frozenset[int] = frozenset()

    def has_contents(self, measurement: Mapping[str, Any]) -> bool:
        """Whether the list has the MD5 or the SHA-256 of an image's file."""
        return bool(self.contents) and any(
            bytes.fromhex(measurement[kind]) in self.contents for kind in _KINDS.values()
        )


def read_blocklist(path: str) -> Blocklist:
    """Reads a text file with a hash on each line: MD5 (32 hexadecimal digits), SHA-256 (64), or `phash:` and 16 digits.

    Blank lines, and what follows a #, are comments.

    Raises:
      UserError: naming FILE:LINE, if a line has another form; if there is no hash.
    """
    contents, perceptual = set(), set()
    for number, line in read_text_lines(path):
        text = line.partition("#")[0].strip().lower()
        digits = text.removeprefix("phash:")
        if not text:
            continue
        if not _HEX.fullmatch(digits) or (len(digits) != 16 if text != digits else len(digits) not in _KINDS):
            raise UserError(
                f"{path}:{number}: {line.strip()!r}: must be an MD5 (32 hexadecimal digits), a SHA-256 (64), or a "
                "perceptual hash (phash: and 16)"
            )
        if text != digits:
            perceptual.add(int(digits, 16))
        else:
            contents.add(bytes.fromhex(digits))
    if not contents | perceptual:
        raise UserError(f"{path}: has no hash")
    return Blocklist(frozenset(contents), frozenset(perceptual))
