"""Progress is a bar on a terminal and lines in a log. Output that cannot be printed does not end a command."""

import contextlib
import io
import os
import sys
import time

import pytest

from EasyLM import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "is_bar"), [(io.StringIO, False), (Terminal, True)])
def test_a_log_gets_lines_and_a_terminal_a_bar(monkeypatch, stream, is_bar):
    monkeypatch.setattr(sys, "stderr", stream())
    for _ in progress.progress(range(1000), desc="reading", file=sys.stderr):
        pass
    text = sys.stderr.getvalue()
    assert ("\r" in text) == is_bar and "1000/1000" in text
    if not is_bar:  # the beginning and the end
        assert [line.split(":")[0] for line in text.splitlines() if line] == ["reading", "reading"]


def test_a_log_gets_a_line_for_each_interval(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.05)
    begin = time.perf_counter()
    with progress.progress(total=10**9, file=sys.stderr) as bar:
        while sys.stderr.getvalue().count("\n") < 5 and time.perf_counter() - begin < 20:
            bar.set_postfix_str("loss 1.0", refresh=False)
            bar.update()
        lines = [line for line in sys.stderr.getvalue().splitlines() if line]
    assert len(lines) == 5 and all("loss 1.0" in line for line in lines[1:])
    assert time.perf_counter() - begin > 4 * 0.05


def test_a_log_on_a_full_disk_does_not_end_the_work(monkeypatch):
    stream = full_disk()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress.progress(range(3), file=sys.stderr)) == [0, 1, 2]
    monkeypatch.undo()
    with contextlib.suppress(OSError):  # what was not written
        stream.close()


def full_disk():
    return open("/dev/full", "w")


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (full_disk, "No space left on device"),
        (broken_pipe, ""),
        (closed, "closed file"),
        (lambda: io.TextIOWrapper(io.BytesIO(), "ascii"), "'ascii' codec can't encode"),
    ],
    ids=["full disk", "broken pipe", "closed", "ascii"],
)
def test_output_that_cannot_be_printed_is_at_most_a_warning(monkeypatch, caplog, stream, reason):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream())
        progress.print_if_possible("stopped after step 3: /données")
        if not sys.stdout.closed:
            sys.stdout.close()  # flushes, as Python does at the exit
    assert reason in caplog.text and bool(reason) == bool(caplog.text)
