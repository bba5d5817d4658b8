"""Which images to keep, and why the others are dropped.

An image is dropped for one reason: the first of the blocklist, the rules in their order, exact duplicates, and near
duplicates. Duplicates are searched among the images that nothing else drops.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from tokenizer.filter import near_hashes
from tokenizer.filter.measurements import Measurements
from tokenizer.filter.rules import Blocklist, Rule

KEPT = 0


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Which duplicates to drop.

    Attributes:
      exact: images with the bytes of an earlier one.
      distance: perceptual hashes within it are near duplicates; None: they are not searched.
    """

    exact: bool
    distance: int | None


class Decision:
    """The reasons of all images of the measurements, in their order.

    Memory is 21 bytes an image, and while near duplicates are searched 58 more for each image that is kept so far.

    Attributes:
      reasons: the reasons in order; number 0 is that of a kept image.
      numbers_n: the number of each image's reason, uint8 [n].
    """

    def __init__(
        self,
        measurements: Measurements,
        rules: Mapping[str, Rule],
        blocklist: Blocklist,
        blocked_distance: int,
        duplicates: Duplicates,
    ):
        """Decides. `blocked_distance` is that of a perceptual hash from one of the blocklist."""
        self.reasons = ["kept", "--blocklist", *rules, "--exact_duplicates", f"--near_duplicates={duplicates.distance}"]
        exact, near = len(self.reasons) - 2, len(self.reasons) - 1
        count = measurements.measured
        self.numbers_n = np.zeros(count, np.uint8)
        self._contents_n, self._hashes_n = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
        self._pixels_n = np.zeros(count, np.uint32)  # 0: the image has no perceptual hash
        tests = [blocklist.has_contents, *rules.values()]
        for index, measurement in enumerate(measurements):
            self.numbers_n[index] = next((n for n, test in enumerate(tests, 1) if test(measurement)), KEPT)
            self._contents_n[index] = int(measurement["sha256"][:16], 16)
            if measurement["phash"]:
                self._hashes_n[index] = int(measurement["phash"], 16)
                self._pixels_n[index] = min(measurement["width"] * measurement["height"], 2**32 - 1)
        if blocklist.perceptual:
            self._drop_blocked(blocklist.perceptual, blocked_distance)
        if duplicates.exact:
            kept_k = self._kept()
            self.numbers_n[kept_k[near_hashes.repeats(self._contents_n[kept_k])]] = exact
        if duplicates.distance is not None:
            self._drop_near(near, duplicates.distance)
        self._exact, self._near = exact, near

    def _kept(self) -> np.ndarray:
        """Returns the indices of the images that are kept so far, int64 [k]."""
        return np.flatnonzero(self.numbers_n == KEPT)

    def _kept_with_hash(self) -> np.ndarray:
        return np.flatnonzero((self.numbers_n == KEPT) & (self._pixels_n > 0))

    def _drop_blocked(self, blocked: frozenset[int], distance: int) -> None:
        """Drops images whose hash is near one of the blocklist; their reason is number 1."""
        pairs = near_hashes.near_pairs(np.unique(self._hashes_n), np.array(sorted(blocked), np.uint64), distance)
        near_p = np.concatenate([np.empty(0, np.uint64), *(hashes_p for hashes_p, _ in pairs)])
        self.numbers_n[np.isin(self._hashes_n, near_p) & (self._pixels_n > 0)] = 1

    def _drop_near(self, number: int, distance: int) -> None:
        """Drops near duplicates. Keeps the image with the most pixels, or the first one of equal size."""
        kept_k = self._kept_with_hash()
        kept_k = kept_k[np.argsort(-self._pixels_n[kept_k].astype(np.int64), kind="stable")]
        self.numbers_n[kept_k[near_hashes.near_earlier(self._hashes_n[kept_k], distance)]] = number

    def counts(self) -> dict[str, int]:
        """Returns the number of images by reason. Leaves out reasons without images, except `kept`."""
        counts = np.bincount(self.numbers_n, minlength=len(self.reasons)).tolist()
        return {reason: count for n, (reason, count) in enumerate(zip(self.reasons, counts)) if count or n == KEPT}

    def examples(self, most: int) -> dict[str, list[tuple[int, int | None]]]:
        """Returns, by reason, the indices of a few images that are dropped, drawn at random.

        A duplicate has the index of the image that is kept instead of it.
        """
        rng = np.random.default_rng(0)
        examples = {}
        for number, reason in enumerate(self.reasons):
            indices = np.flatnonzero(self.numbers_n == number)
            if number != KEPT and len(indices):
                drawn = np.sort(rng.choice(indices, min(most, len(indices)), replace=False)).tolist()
                examples[reason] = [(index, self._original(index)) for index in drawn]
        return examples

    def _original(self, index: int) -> int | None:
        """Returns the index of the kept copy, or of the nearest kept image; None: the image is no duplicate."""
        if self.numbers_n[index] not in (self._exact, self._near):
            return None
        copies = np.flatnonzero((self._contents_n == self._contents_n[index]) & (self.numbers_n == KEPT))
        if len(copies):
            return int(copies[0])
        kept_k = self._kept_with_hash()  # the copy of an exact duplicate can be a near duplicate of another image
        distances_k = np.bitwise_count(self._hashes_n[kept_k] ^ self._hashes_n[index])
        return int(kept_k[np.argmin(distances_k)])
