"""The original of a duplicate is an image that is kept."""

import numpy as np

from tokenizer.filter.decision import KEPT, Decision, Duplicates
from tokenizer.filter.rules import Blocklist


class MeasurementList(list):
    """Stands for the files of measurements."""

    @property
    def measured(self) -> int:
        """Their number."""
        return len(self)


def measurement(contents: int, phash: int, side: int = 64, score: float = 1.0) -> dict:
    """The properties that a decision reads."""
    return {
        "sha256": f"{contents:016x}" + 48 * "0",
        "md5": 32 * "0",
        "phash": f"{phash:016x}",
        "width": side,
        "height": side,
        "scores": {"beauty": score},
    }


def decide(measurements: list[dict]) -> Decision:
    rules = {"--min=beauty:1": lambda m: m["scores"]["beauty"] < 1}
    return Decision(MeasurementList(measurements), rules, Blocklist(), 0, Duplicates(exact=True, distance=2))


def test_a_copy_names_the_copy_that_is_kept():
    """The first copy has a low score."""
    decision = decide([measurement(7, 0, score=0.5), measurement(7, 0), measurement(7, 0)])
    assert decision.examples(5)["--exact_duplicates"] == [(2, 1)]


def test_a_copy_of_a_near_duplicate_names_the_image_that_is_kept():
    near, far, large = measurement(7, 0b1), measurement(8, 2**64 - 1), measurement(9, 0, side=99)
    decision = decide([near, far, near, large])
    assert decision.examples(5) == {"--exact_duplicates": [(2, 3)], "--near_duplicates=2": [(0, 3)]}


def test_each_duplicate_names_a_kept_image_with_its_contents_or_near_it():
    rng = np.random.default_rng(0)
    hashes = [int(bits) for bits in rng.integers(0, 64, 40)]  # many are at a distance of 1 to 3
    drawn = [int(contents) for contents in rng.integers(0, 40, 300)]
    measurements = [
        measurement(contents, hashes[contents], 10 + contents % 7, score=rng.choice([0.5, 1])) for contents in drawn
    ]
    decision = decide(measurements)
    examples = decision.examples(300)
    pairs = [pair for reason in ("--exact_duplicates", "--near_duplicates=2") for pair in examples[reason]]
    assert len(pairs) > 100
    for place, original in pairs:
        assert decision.numbers_n[original] == KEPT
        assert (hashes[drawn[place]] ^ hashes[drawn[original]]).bit_count() <= 2
        if KEPT in decision.numbers_n[np.array(drawn) == drawn[place]]:
            assert drawn[original] == drawn[place]
