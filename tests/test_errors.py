"""Error messages name the choices, and are one line of limited length."""

import pytest

from EasyLM.errors import MOST_CHARACTERS, UserError, choose


def test_choose_lists_the_choices():
    with pytest.raises(UserError, match=r"--kind='vidoe': choose one of 'paired', 'video'"):
        choose("--kind", "vidoe", ("paired", "video"))


def test_a_message_is_one_line_of_limited_length():
    assert str(UserError("a\nb")) == "a\\nb"
    assert str(UserError("x" * MOST_CHARACTERS)) == "x" * MOST_CHARACTERS
    message = str(UserError(f"--a: {'y' * 10**6}: too long"))
    assert message.startswith("--a: yyy") and message.endswith("yyy: too long") and " [...] " in message
    assert len(message) < MOST_CHARACTERS + 10
