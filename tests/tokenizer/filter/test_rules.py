"""Rules drop what is beyond a limit and keep what is at it. Blocklists and limits are read strictly."""

import re

import pytest

from EasyLM.errors import UserError
from tokenizer.filter import rules, scores
from tokenizer.filter.listing import Entry
from tokenizer.filter.rules import Limits

NO_LIMITS = Limits(0, 0, 0, 0, {}, {})
AT_THE_LIMIT = {"width": 300, "height": 100, "bytes": 3000, "contrast": 2.0, "scores": {"a": 5.0}}


@pytest.mark.parametrize(
    ("limits", "reason", "beyond"),
    [
        (Limits(100, 0, 0, 0, {}, {}), "--min_side=100", {"height": 99}),
        (Limits(0, 3.0, 0, 0, {}, {}), "--max_aspect_ratio=3", {"height": 99}),
        (Limits(0, 3.0, 0, 0, {}, {}), "--max_aspect_ratio=3", {"width": 33}),
        (Limits(0, 0, 0.1, 0, {}, {}), "--min_bytes_per_pixel=0.1", {"bytes": 2999}),
        (Limits(0, 0, 0, 2.0, {}, {}), "--min_contrast=2", {"contrast": 1.99}),
        (Limits(0, 0, 0, 0, {"a": 5.0}, {}), "--min=a:5", {"scores": {"a": 4.99}}),
        (Limits(0, 0, 0, 0, {"a": 5.0}, {}), "--min=a:5", {"scores": {"a": None}}),
        (Limits(0, 0, 0, 0, {}, {"a": 5.0}), "--max=a:5", {"scores": {"a": 5.01}}),
        (Limits(0, 0, 0, 0, {}, {"a": 5.0}), "--max=a:5", {"scores": {"a": None}}),
    ],
)
def test_a_rule_drops_what_is_beyond_its_limit(limits, reason, beyond):
    assert not rules.make_rules(NO_LIMITS)
    ((name, is_dropped),) = rules.make_rules(limits).items()
    assert name == reason and not is_dropped(AT_THE_LIMIT) and is_dropped({**AT_THE_LIMIT, **beyond})


def test_limits_of_scores_are_parsed_strictly():
    assert scores.parse_limits("min", "a:5, length(b:c):1e1,") == {"a": 5, "length(b:c)": 10}
    for text, problem in {"a": "'a' must be FIELD:NUMBER", "a:x": "'a:x' must be", "a:nan": "must be", ":1": "must be",
                          "a:1,a:2": "a occurs twice"}.items():  # fmt: skip
        with pytest.raises(UserError, match=rf"^--min={re.escape(text)}: .*{problem}"):
            scores.parse_limits("min", text)


def test_scores_are_numbers_or_the_length_of_a_text(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"n": 1, "text": "0.25", "caption": "a cat", "flag": true, "none": null, "infinite": 1e999}')
    names = ["n", "text", "caption", "length(caption)", "flag", "none", "infinite", "missing", "length(n)"]
    expected = [1.0, 0.25, None, 5.0, 1.0, None, None, None, None]
    assert scores.read_scores(Entry("a", "a.png", "", str(path)), names) == dict(zip(names, expected))
    assert scores.read_scores(Entry("a", "a.png", ""), ["n"]) == {"n": None}
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"a\.json: .*must be an object"):
        scores.read_scores(Entry("a", "a.png", "", str(path)), ["n"])


def test_a_blocklist_has_three_kinds_of_hashes(tmp_path):
    path = tmp_path / "list.txt"
    md5, sha256, phash = "0a" * 16, "0b" * 32, "0c" * 8
    path.write_text(f"# a comment\n{md5.upper()}  # why\n\n{sha256}\nphash:{phash}\n")
    blocklist = rules.read_blocklist(str(path))
    assert blocklist.has_contents({"md5": md5, "sha256": "0" * 64})
    assert blocklist.has_contents({"md5": "0" * 32, "sha256": sha256})
    assert not blocklist.has_contents({"md5": "0" * 32, "sha256": "0" * 64})
    assert blocklist.perceptual == {int(phash, 16)}
    for line in ("0a0a", "phash:" + md5, phash, "x" * 32, "phash:"):
        path.write_text(f"{md5}\n{line}\n")
        with pytest.raises(UserError, match=rf"list\.txt:2: '{line}': must be an MD5"):
            rules.read_blocklist(str(path))
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match="has no hash"):
        rules.read_blocklist(str(path))
