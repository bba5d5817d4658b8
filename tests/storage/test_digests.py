"""Digests of contents: what they notice, their cost, and those of version 0.1.0."""

import os

import pytest

from EasyLM.storage import content_digest, digests, same_contents


def digest(path, data: bytes) -> str:
    path.write_bytes(data)
    return content_digest(str(path), len(data))


@pytest.mark.parametrize("count", [3, 100, 30_000])
def test_reordered_lines_in_the_middle_are_noticed(tmp_path, count):
    """The file has the same size and the same ends; the largest one is only sampled."""
    lines = [b"%06d" % number * 100 + b"\n" for number in range(count + 400)]
    reordered = lines[:200] + lines[200:-200][::-1] + lines[-200:]
    before, after = (digest(tmp_path / "a.jsonl", b"".join(order)) for order in (lines, reordered))
    assert before != after and before[:16] == after[:16]


def test_two_exchanged_lines_of_a_small_file_are_noticed(tmp_path):
    lines = [b"%06d" % number * 1000 + b"\n" for number in range(200)]
    before = digest(tmp_path / "a.jsonl", b"".join(lines))
    lines[99], lines[100] = lines[100], lines[99]
    assert digest(tmp_path / "a.jsonl", b"".join(lines)) != before


def test_the_cost_is_bounded(tmp_path, monkeypatch):
    """A sparse file of a terabyte is sampled."""
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
        before = content_digest(str(path), 1 << 40)
        file.seek((1 << 40) - digests.SAMPLE_BYTES // 2)
        file.write(b"x")
    assert content_digest(str(path), 1 << 40) != before
    monkeypatch.setattr(digests, "SAMPLES", 4)
    assert digests._sample_starts(1 << 40)[0] == 0 and len(digests._sample_starts(1 << 40)) == 4
    assert digests._sample_starts(1 << 40)[-1] == (1 << 40) - digests.SAMPLE_BYTES


@pytest.mark.parametrize("size", [0, 1, digests.SAMPLE_BYTES, digests.SAMPLE_BYTES + 1])
def test_every_byte_of_a_small_file_counts(tmp_path, size):
    data = os.urandom(size)
    before = digest(tmp_path / "a", data)
    assert len(before) == 32 and digest(tmp_path / "a", data) == before
    for place in {0, size // 2, size - 1} & set(range(size)):
        assert digest(tmp_path / "a", data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]) != before


def test_digests_of_version_0_1_0_equal_those_that_start_with_them():
    old, new = {"files": [{"size": 3, "content": "0" * 16}]}, {"files": [{"size": 3, "content": "0" * 16 + "1" * 16}]}
    assert same_contents(old, new) and same_contents(new, old) and same_contents(new, new)
    other = {"files": [{"size": 3, "content": "0" * 16 + "2" * 16}]}
    assert not same_contents(new, other)
    assert not same_contents(old, {"files": []}) and not same_contents(old, {"files": [{"size": 3}]})
    assert not same_contents("abc", "abcdef") and not same_contents(None, "0" * 16) and same_contents(3, 3)
