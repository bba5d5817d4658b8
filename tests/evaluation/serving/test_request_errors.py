"""Invalid requests: the status, code and message of each error response."""

import asyncio
import gzip
import json

import pytest
from serve_kit import (
    CODES,
    JSON_HEADER,
    LIMITS,
    PIXELS,
    SECONDS,
    TINY,
    TOKENS,
    HeldPrompter,
    ask,
    assert_error,
    base64_of,
    bomb,
    events_of,
    exchange,
    form,
    png,
    post,
    serve_while,
    tiny_engine,
)

from evaluation.serving.app import make_app


async def chunks(data: bytes):
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]


def with_settings(text: bytes) -> dict:
    """Returns the httpx options of a valid prompt with JSON text that Python's `json` does not write."""
    tokens = json.dumps([[0] * TOKENS]).encode()
    return {"content": b'{"tokens":%s,%s}' % (tokens, text), "headers": JSON_HEADER}


WRONG_ROW = [[CODES] * TOKENS]
INVALID_REQUESTS = {
    "declared too large": ({"content": b"x" * 30_000, "headers": JSON_HEADER}, 413, "body_too_large", "20000"),
    "too large in parts": (lambda: {"content": chunks(b"x" * 30_000), "headers": JSON_HEADER}, 413, "body_too_large"),
    "form too large": (form(b"x" * 30_000), 413, "body_too_large"),
    "too many": (form(*[png(1)] * 4), 413, "too_many_pictures", "4", "at most 3"),
    "far too many": (form(*[b"x"] * 20), 422, "invalid_form", "more parts than any valid request"),
    "100 in JSON": ({"json": {"pictures": [""] * 100}}, 413, "too_many_pictures", "at most 3"),
    "too many pixels": (form(bomb(1001, 1000)), 413, "too_many_pixels", "pictures[0]", "1001 x 1000", str(PIXELS)),
    "too many in all": (form(bomb(800, 800), bomb(800, 800)), 413, "too_many_pixels", "pictures[1]"),
    "a bomb": (form(bomb()), 413, "too_many_pixels", "pictures[0]"),
    "no image": (form(png(1), b"garbage"), 422, "invalid", "pictures[1]", "not a readable image", "PNG, JPEG"),
    "an empty file": (form(b""), 422, "invalid", "pictures[0]"),
    "half an image": (form(png(1)[:200]), 422, "invalid", "pictures[0]", "broken"),
    "a line break": ({"json": {"a\nb\u2028c": 1}}, 422, "invalid", "a\\nb\\u2028c: Extra inputs"),
    "another file": ({"files": [("x", b"x")]}, 422, "invalid", "x: Extra inputs"),
    "a file for a number": ({"files": [("pictures", png(1)), ("seed", b"1")]}, 422, "invalid", "seed"),
    "a file after text": ({"files": [("seed", b"1")], "data": {"seed": "1"}}, 422, "invalid", "seed: given twice"),
    "text after a file": ({"files": [("seed", b"1"), ("seed", (None, "1"))]}, 422, "invalid", "seed: given twice"),
    "nothing": ({"json": {}}, 422, "invalid", "either pictures or tokens"),
    "no images": ({"json": {"pictures": []}}, 422, "invalid", "pictures: give at least one image"),
    "no tokens": ({"json": {"tokens": []}}, 422, "invalid", "tokens: give at least one image"),
    "two prompts": ({"json": {"pictures": base64_of(png(1)), "tokens": WRONG_ROW}}, 422, "invalid", "either"),
    "a long prompt": ({"json": {"tokens": [[0] * TOKENS] * 4}}, 422, "invalid", "4 images", "at most 3"),
    "wrong id": ({"json": {"tokens": WRONG_ROW}}, 422, "invalid", f"token id {CODES}", f"0..{CODES - 1}"),
    "negative id": ({"json": {"tokens": [[-1] * TOKENS]}}, 422, "invalid", "tokens.0.0"),
    "huge id": ({"json": {"tokens": [[10**30] * TOKENS]}}, 422, "invalid", "tokens.0.0"),
    "ragged": ({"json": {"tokens": [[1], [1, 2]]}}, 422, "invalid", "different numbers"),
    "short": ({"json": {"tokens": [[1, 2]]}}, 422, "invalid", f"each image has {TOKENS}"),
    "no base64": ({"json": {"pictures": ["?!"]}}, 422, "invalid", "pictures.0: not base64 (Invalid symbol 63"),
    "lines of base64": (
        {"json": {"pictures": ["iVBO\nRw0K"]}},
        422,
        "invalid",
        "pictures.0: not base64",
        "line breaks",
    ),
    "a data URL": (
        {"json": {"pictures": ["data:image/png;base64,iVBO"]}},
        422,
        "invalid",
        "not base64",
        "such as data:",
    ),
    "a path": ({"json": {"pictures": ["~/\u56fe.png"]}}, 422, "invalid", "pictures.0: not base64"),
    "an empty body": ({"content": b"", "headers": JSON_HEADER}, 422, "invalid", "the body is empty"),
    "an empty form": (
        {"headers": {"content-type": "multipart/form-data; boundary=b"}},
        422,
        "invalid",
        "body is empty",
    ),
    "null": ({"content": b"null", "headers": JSON_HEADER}, 422, "invalid", "object"),
    "a list": ({"json": ["pictures"]}, 422, "invalid", "object"),
    "no UTF-8": ({"content": b'{"pictures":["\xff"]}', "headers": JSON_HEADER}, 422, "invalid", "Invalid JSON"),
    "half a character": ({"content": b'{"\\ud800":1}', "headers": JSON_HEADER}, 422, "invalid", "Invalid JSON"),
    "a compressed body": (
        {"content": gzip.compress(b"{}"), "headers": JSON_HEADER | {"content-encoding": "gzip"}},
        415,
        "unsupported_encoding",
        "'gzip': send the body uncompressed",
    ),
    "a form of curl -d": ({"data": {"seed": "1"}}, 415, "unsupported_media_type", "x-www-form-urlencoded"),
    "a query": (form(png(1)) | {"params": {"seed": 5}}, 422, "invalid", "query parameter 'seed'", "in the body"),
    "no JSON": ({"content": b"{", "headers": JSON_HEADER}, 422, "invalid", "JSON"),
    "deep JSON": ({"content": b"[" * 9_000, "headers": JSON_HEADER}, 422, "invalid", "JSON"),
    "no media type": ({"content": b"{}"}, 415, "unsupported_media_type"),
    "no boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 422, "invalid_form"),
    "misspelt": ({"json": {"picture": []}}, 422, "invalid", "picture: Extra inputs"),
    "no number": (form(png(1), seed="x"), 422, "invalid", "seed"),
    "seed": (form(png(1), seed=-1), 422, "invalid", "seed=-1", "0..2147483647"),
    "temperature": (form(png(1), temperature=-1), 422, "invalid", "temperature=-1.0"),
    "temperature nan": (form(png(1), temperature="nan"), 422, "invalid", "temperature=nan"),
    "NaN": (with_settings(b'"temperature":NaN'), 422, "invalid", "temperature=nan"),
    "infinite": (with_settings(b'"temperature":1e999'), 422, "invalid", "temperature=inf"),
    "an infinite number": (with_settings(b'"n_candidates":1e999'), 422, "invalid", "n_candidates"),
    "half a candidate": (with_settings(b'"n_candidates":1.5'), 422, "invalid", "n_candidates"),
    "huge candidates": (with_settings(b'"n_candidates":1%s' % (b"0" * 99)), 422, "invalid", "at most 64"),
    "a huge seed": (with_settings(b'"seed":1%s' % (b"0" * 99)), 422, "invalid", "seed=1000"),
    "top_p": (form(png(1), top_p=0), 422, "invalid", "top_p=0.0"),
    "top_k": (form(png(1), top_k=-1), 422, "invalid", "top_k=-1"),
    "context": (form(png(1), context_frames=1), 422, "invalid", "context_frames=1"),
    "no candidates": (form(png(1), n_candidates=0), 422, "invalid", "n_candidates=0"),
    "no new images": (form(png(1), n_new_frames=0), 422, "invalid", "n_new_frames=0"),
    "many answers": (form(png(1), n_candidates=9, n_new_frames=9), 422, "invalid", "at most 64"),
    "output": (form(png(1), output="gif"), 422, "invalid", "output"),
}


@pytest.mark.parametrize("name", INVALID_REQUESTS)
def test_invalid_requests_are_refused(app, name):
    options, status, code, *parts = INVALID_REQUESTS[name]
    response = post(app, "/generate", **(options() if callable(options) else options))
    assert_error(response, status, code, *parts)


def test_other_endpoints_have_the_same_checks(app):
    assert_error(post(app, "/tokenize", **form(bomb())), 413, "too_many_pixels")
    assert_error(post(app, "/tokenize", json={"tokens": WRONG_ROW}), 422, "invalid", "tokens: Extra inputs")
    assert_error(post(app, "/tokenize", json={}), 422, "invalid", "pictures: give at least one image")
    assert_error(post(app, "/perplexity", **form(png(1))), 422, "invalid", "either targets or target_tokens")
    rows = {"tokens": [[0] * TOKENS] * 3, "target_tokens": [[0] * TOKENS] * 2}
    assert_error(post(app, "/perplexity", json=rows), 422, "invalid", "3 images and 2 targets", "holds 4")
    many = [("pictures", png(1)), ("pictures", png(1)), ("targets", png(1)), ("targets", png(1))]
    assert_error(post(app, "/perplexity", files=many), 413, "too_many_pictures", "targets: 4", "at most 3")
    large = [("pictures", bomb(800, 800)), ("targets", bomb(800, 800))]
    assert_error(post(app, "/perplexity", files=large), 413, "too_many_pixels", "targets[0]")
    unknown_path, wrong_method = ask(app, ("GET", "/nowhere", {}), ("GET", "/generate", {}))
    assert_error(unknown_path, 404, "http_404")
    assert_error(wrong_method, 405, "http_405")


def test_the_token_is_checked_before_the_body_is_read(engine):
    app = make_app(engine, LIMITS, token="sesame")
    for headers in ({}, {"authorization": "Bearer sesam"}, {"authorization": "Basic sesame"}):
        response = post(app, "/generate", content=b"x" * 30_000, headers=headers)
        assert_error(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    authorized = post(app, "/tokenize", **form(png(1)), headers={"authorization": "Bearer sesame"})
    assert authorized.status_code == 200
    assert ask(app, ("GET", "/ready", {}))[0].json()["resolution"] == TINY.resolution


def test_the_service_continues_after_an_internal_error(caplog):
    prompter = HeldPrompter(failing=True)
    engine = tiny_engine(prompter)
    app = make_app(engine, LIMITS)
    failed = post(app, "/generate", **form(png(1)))
    assert_error(failed, 500, "internal")
    assert "fire" not in failed.text
    streamed = events_of(post(app, "/generate", **form(png(1), output="stream")))
    assert [(name, body["error"]["code"]) for name, body in streamed] == [("error", "internal")]
    assert "the device is on fire" in caplog.text
    prompter.failing = False
    prompter.release.set()
    assert post(app, "/generate", **form(png(1))).status_code == 200
    assert engine.close(SECONDS)


NO_HTTP = {
    "garbage": b"\x16\x03\x01\x02\x00\x01\r\n\r\n",  # so a client of HTTPS begins
    "a negative size": b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    "no host": b"GET /ready HTTP/1.1\r\n\r\n",
    "a broken chunk": b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
}


def test_what_is_not_http_gets_an_error_like_all_others(app):
    async def scenario(port, server):
        return await asyncio.gather(*(exchange(port, request) for request in NO_HTTP.values()))

    for name, answer in zip(NO_HTTP, asyncio.run(serve_while(app, LIMITS, scenario)), strict=True):
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and b"application/json" in head, (name, answer)
        assert json.loads(body)["error"]["code"] == "bad_request", name
