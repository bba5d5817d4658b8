"""The page's files have a total size and a largest age; the bodies of its requests are bounded."""

import asyncio
import os
import time

import httpx
import pytest
from serve_kit import assert_error

from evaluation.page.guard import UPLOAD_BYTES, PageFiles, PageGuard
from evaluation.serving import Limits
from evaluation.serving.request_errors import RequestError


def write(path, num_bytes: int = 10, age: float = 0.0):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(bytes(num_bytes))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_files_are_removed_after_an_hour_except_those_of_the_page(tmp_path):
    example = write(tmp_path / "analogy_0.png", age=9999)
    files = PageFiles(tmp_path)
    old, new = write(tmp_path / "a" / "old.png", age=3700), write(tmp_path / "b" / "new.png", age=3500)
    answer = write(tmp_path / "answer_0.png", age=3700)
    assert files.remove_old() == 10
    assert example.exists() and new.exists() and not old.parent.exists() and not answer.exists()


def test_uploads_remove_the_oldest_files_when_they_need_room(tmp_path):
    files = PageFiles(tmp_path, most_bytes=100)
    paths = [write(tmp_path / str(i) / "x.png", 30, age=1000 - i) for i in range(3)]
    with files.reserved(20):
        assert [path.exists() for path in paths] == [False, True, True]
        with files.reserved(45):  # the first upload is still arriving
            assert [path.exists() for path in paths] == [False, False, True]


def test_uploads_of_the_last_minute_are_not_removed(tmp_path):
    files = PageFiles(tmp_path, most_bytes=100)
    recent = write(tmp_path / "0" / "x.png", 60)
    with pytest.raises(RequestError, match="too many uploads") as refused, files.reserved(50):
        pass
    assert refused.value.status == 429 and refused.value.retry_after and recent.exists()
    with files.reserved(40):
        pass
    with files.reserved(40):  # the first reservation has ended
        pass


def ask(tmp_path, requests, most_bytes=1000) -> list[httpx.Response]:
    """Sends requests to an application that stores uploads and returns the size of other bodies."""
    stored = []

    async def app(scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if scope["path"].endswith("/upload"):
            write(tmp_path / f"{len(stored)}" / "upload", len(body))
            stored.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % len(body)})

    guard = PageGuard(app, PageFiles(tmp_path, most_bytes), Limits())

    async def send_all():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://test") as client:
            return [await client.request(*request, **options) for *request, options in requests]

    return asyncio.run(send_all())


async def chunks(data: bytes):
    yield data


def test_uploads_and_bodies_of_the_page_are_bounded(tmp_path):
    upload = ("POST", "/gradio_api/upload")
    fitting, full, chunked, other, large, get = ask(
        tmp_path,
        [
            (*upload, {"content": b"x" * 600}),
            (*upload, {"content": b"x" * 600}),
            (*upload, {"content": chunks(b"x")}),  # without a length, it may need any size
            ("POST", "/gradio_api/queue/join", {"content": b"x" * 2**20}),
            ("POST", "/gradio_api/queue/join", {"content": b"x" * (2**20 + 1)}),
            ("GET", "/", {}),
        ],
    )
    assert (fitting.text, other.text, get.text) == ("600", str(2**20), "0")
    for refused in (full, chunked):
        assert_error(refused, 429, "uploads_full")
    assert_error(large, 413, "body_too_large")
    assert sum(path.stat().st_size for path in tmp_path.rglob("upload")) == 600


def test_one_upload_is_bounded(tmp_path):
    (refused,) = ask(
        tmp_path, [("POST", "/upload", {"content": b"x" * (UPLOAD_BYTES + 1)})], most_bytes=2 * UPLOAD_BYTES
    )
    assert_error(refused, 413, "body_too_large")


def test_120_uploads_of_4_megabytes_stay_within_the_total(tmp_path):
    files = PageFiles(tmp_path, most_bytes=40_000)
    refused = 0
    for number in range(120):
        try:
            with files.reserved(4_000):
                write(tmp_path / str(number) / "x.png", 4_000, age=61 if number % 2 else 0)
        except RequestError:
            refused += 1
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.png")) <= 40_000
    assert 0 < refused < 110  # the ones of the last minute fill the room
