"""DATASET.md has the tables of scripts/data_cost.py, and these follow from the rates."""

import pathlib
import re

import data_cost
import pytest

from EasyLM import flags

ROOT = pathlib.Path(__file__).parent.parent


def _tables(**changes) -> str:
    config = flags.defaults(data_cost.FLAGS)
    config.update(changes)
    return data_cost.tables(config)


def _hours(text: str, step: str) -> list[float]:
    """Returns the hours of one unit, and of all of them."""
    (row,) = (line for line in text.splitlines() if step in line)
    return [float(number.replace(",", "")) for number in re.findall(r"([\d,.]+) (?:\w+-hours|on)", row)]


def test_the_document_has_the_tables():
    assert _tables() in (ROOT / "DATASET.md").read_text()


def test_hours_are_images_over_rates():
    text = _tables()
    assert _hours(text, "build: encode") == pytest.approx([960e6 / 1998 / 3600, 960e6 / 1998 / 3600 / 64], rel=0.02)
    half = _tables(images=600_000_000, cores=1024)
    for step in ("filter: measure", "build: read"):
        of_one, of_all = _hours(text, step)
        assert _hours(half, step) == pytest.approx([of_one / 2, of_all / 4], rel=0.2)


def test_the_search_compares_the_hashes_that_are_equal_in_two_blocks():
    few, many = 10**6, 10**9
    assert data_cost.search_seconds(few, 2) == pytest.approx(6 * few * data_cost.SECONDS_PER_HASH, rel=1e-3)
    compared = 6 * many**2 / 2**32  # distance 2: four blocks of 16 bits
    expected = 6 * many * data_cost.SECONDS_PER_HASH + compared * data_cost.SECONDS_PER_COMPARISON
    assert data_cost.search_seconds(many, 2) == pytest.approx(expected)


def test_a_card_waits_while_fewer_images_are_read_than_it_encodes():
    assert data_cost.waiting_share(1, 2 * data_cost.READ_PER_SECOND) == 0.5
    assert data_cost.waiting_share(4, 2 * data_cost.READ_PER_SECOND) == 0
