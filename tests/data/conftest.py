"""Data sets that several tests use."""

import numpy as np
import pytest
from data_kit import base64_line, copy_golden


@pytest.fixture
def sentences(golden, tmp_path):
    """A copy of the golden data set."""
    return copy_golden(golden, tmp_path)


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    """Files with sentences of 0 to 11 tokens, as JSON in several spellings."""
    directory, rng = tmp_path_factory.mktemp("two"), np.random.default_rng(1)
    spellings = [
        '{"tokens": "%s"}',
        '{"tokens":"%s"}',
        '{"tokens": "%s", "label": "cat"}',
        '{"other": {"tokens": "AAAA"}, "tokens" :  "%s" }\r',
        '{"tokens": "%s"}',
    ]
    for name in ("b", "a"):
        lines = []
        for number in range(300):
            line = base64_line(rng.integers(0, 512, rng.integers(0, 12)), spellings[number % 5])
            lines.append(line.replace("/", r"\/") if number % 7 == 0 else line)  # as PHP writes base64
        # No newline after the last line.
        (directory / f"{name}.jsonl").write_text("\n\n".join(lines))
    return directory
