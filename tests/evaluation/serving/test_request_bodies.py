"""Hostile bodies: refused at once, in little memory, while the service answers others. Forms: whole, or refused."""

import asyncio
import json
import pathlib
import time

import httpx
import pytest
from serve_kit import JSON_HEADER, LIMITS, TOKENS, assert_error, base64_of, form, png, post

from evaluation.serving import Limits, protocol
from evaluation.serving.app import make_app
from evaluation.serving.request_bodies import parse_form
from evaluation.serving.request_errors import RequestError

FORM_HEADER = {"content-type": "multipart/form-data; boundary=b"}
PART = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="pictures"; filename="a"\r\n\r\n%s\r\n'


def filled(begin: bytes, repeated: bytes, end: bytes, size: int) -> bytes:
    return begin + repeated * ((size - len(begin) - len(end)) // len(repeated)) + end


# A pattern (begin, repeated, end) of each hostile body, and its content-type.
FROZEN_SECONDS = 20  # an answer takes milliseconds; when all errors of a body were formatted, it took minutes
HOSTILE = {
    "numbers for images": (b'{"pictures":[1', b",1", b"]}"),
    "lists for images": (b'{"pictures":[[]', b",[]", b"]}"),
    "a string for images": (b'{"pictures":"', b"A", b'"}'),
    "no base64": (b'{"pictures":["', b"?", b'"]}'),
    "an escaped image": (b'{"pictures":["', b"\\u0041", b'"]}'),
    "one large image": (b'{"pictures":["', b"AAAA", b'"]}'),
    "negative tokens": (b'{"tokens":[[-1', b",-1", b"]]}"),
    "negative images": (b'{"tokens":[[-1]', b",[-1]", b"]}"),
    "empty images": (b'{"tokens":[[]', b",[]", b"]}"),
    "a long image": (b'{"tokens":[[1', b",1", b"]]}"),
    "unknown keys": (b'{"a":1', b',"b":1', b"}"),
    "an unknown long key": (b'{"', b"k", b'":1}'),
    "an unknown long value": (b'{"k":"', b"v", b'"}'),
    "objects": (b'{"pictures":{"a":', b'{"a":', b"1"),
    "the same key": (b'{"seed":1', b',"seed":1', b"}"),
    "deep": (b'{"tokens":', b"[", b"1"),
    "a long integer": (b'{"seed":', b"9", b"}"),
    "a long fraction": (b'{"temperature":0.', b"1", b"}"),
    "a long text for a number": (b'{"n_candidates":"', b"9", b'"}'),
    "a long output": (b'{"output":"', b"png", b'"}'),
    "spaces": (b"", b" ", b"{"),
    "commas": (b"", b",", b""),
    "emoji": ('{"pictures":["😀'.encode(), b"A", b'"]}'),
    "form: line ends": (b"--b\r\n", b"\r\n", b"--b--"),
    "form: almost a boundary": (b"--b", b"\r\n--", b"\r\n--b--"),
    "form: boundaries": (b"--b", b"\r\n--b", b"--"),
    "form: a long header": (b"--b\r\nContent-Disposition: ", b"x", b"\r\n\r\n1\r\n--b--"),
    "form: many headers": (b"--b\r\n", b"a:b\r\n", b"\r\n1\r\n--b--"),
    "form: many parts": (b"", PART % (b"seed", b"1"), b"--b--"),
    "form: a long number": (b'--b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n', b"9", b"\r\n--b--"),
    "form: a long preamble": (b"", b"\r\n-", b"\r\n--b--"),
}


def peak_megabytes() -> float:
    """The largest resident memory of this process since the last `reset_peak`."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def reset_peak() -> None:
    pathlib.Path("/proc/self/clear_refs").write_text("5")


async def refuse(app, body: bytes, headers: dict) -> tuple[httpx.Response, float, float]:
    """Posts a body. Returns the response, its seconds, and the longest time that another request took meanwhile."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.get("/ready")
        begin = time.monotonic()
        posted = asyncio.create_task(client.post("/generate", content=body, headers=headers))
        longest = 0.0
        while not posted.done():
            asked = time.monotonic()
            await asyncio.sleep(0)
            await client.get("/ready")
            longest = max(longest, time.monotonic() - asked)
        return await posted, time.monotonic() - begin, longest


@pytest.mark.slow
def test_hostile_bodies_of_16_megabytes_are_refused_at_once(engine):
    num_bytes = 16 * 2**20
    app = make_app(engine, Limits(body_bytes=num_bytes, images=64))
    for name, pattern in HOSTILE.items():
        body = filled(*pattern, size=num_bytes)
        reset_peak()
        before = peak_megabytes()
        headers = FORM_HEADER if name.startswith("form") else JSON_HEADER
        response, taken, blocked = asyncio.run(refuse(app, body, headers))
        assert response.status_code in (413, 422), (name, response.text[:300])
        assert len(response.content) < 3000, name
        assert taken < FROZEN_SECONDS and blocked < FROZEN_SECONDS, (name, taken, blocked)
        assert peak_megabytes() - before < 4 + 7 * num_bytes / 2**20, (name, peak_megabytes() - before)


def test_the_bodies_of_all_open_requests_are_bounded(engine, monkeypatch):
    monkeypatch.setattr("evaluation.serving.limits._OPEN_BODIES", 2)
    app = make_app(engine, LIMITS)

    async def scenario():
        release = asyncio.Event()

        async def held():
            yield b" " * LIMITS.body_bytes
            await release.wait()

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            options = {"headers": JSON_HEADER}
            waiting = [asyncio.create_task(client.post("/generate", content=held(), **options)) for _ in range(2)]
            await asyncio.sleep(0.1)
            refused = await client.post("/generate", content=b"{}", **options)
            release.set()
            for answer in waiting:
                await answer
            return refused, await client.post("/generate", content=b"{}", **options)

    refused, later = asyncio.run(scenario())
    assert_error(refused, 503, "busy", "bytes")
    assert_error(later, 422, "invalid")  # the earlier bodies no longer count


DUPLICATES = {
    "settings": b'{"tokens":[],"seed":1,"seed":1}',
    "escaped": b'{"tokens":[],"\\u0073eed":1,"seed":1}',
    "images": b'{"tokens":[],"pictures":null,"pictures":null}',
}


@pytest.mark.parametrize("name", DUPLICATES)
def test_a_field_given_twice_is_refused(app, name):
    assert_error(post(app, "/generate", content=DUPLICATES[name], headers=JSON_HEADER), 422, "invalid", "a field twice")


def test_a_form_is_whole_or_refused():
    body = PART % (b"seed", b"5") + FILE % b"1" + FILE % b"\r\n--c\r\n" + b"--b--\r\n"
    whole = {"seed": "5", "pictures": [b"1", b"\r\n--c\r\n"]}
    assert parse_form(bytearray(body), FORM_HEADER["content-type"], 3) == whole
    assert parse_form(bytearray(b"preamble\r\n" + body), FORM_HEADER["content-type"], 3) == whole
    assert parse_form(bytearray(body[:-2]), FORM_HEADER["content-type"], 3) == whole
    for end in range(len(body) - 2):
        with pytest.raises(RequestError):
            parse_form(bytearray(body[:end]), FORM_HEADER["content-type"], 3)


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "the body is empty"),
        (b"--c\r\n\r\n--c--", "does not have the boundary"),
        (FILE % b"1", "truncated"),
        (FILE % b"1" + b"--b", "truncated"),
        (b"--b\r\n\r\n1\r\n--b--", "part 1 has no name"),
        (b"--bb" + FILE % b"1" + b"--b--", "part 1"),
        (PART.replace(b"form-data", b"attachment") % (b"seed", b"1") + b"--b--", "part 1 has no name"),
        (PART % (b"tokens", b"[[1]]") + b"--b--", "tokens: a form sends images as files"),
        (PART % (b"pictures", b"AAAA") + b"--b--", "pictures: a form sends images as files"),
        (PART % (b"seed", b"9" * 2000) + b"--b--", "seed: longer than"),
    ],
)
def test_malformed_forms_are_refused(app, body, message):
    response = post(app, "/generate", content=body, headers=FORM_HEADER)
    assert response.status_code == 422 and message in response.json()["error"]["message"], response.text


def test_forms_of_httpx_and_browsers_are_read():
    request = httpx.Request("POST", "http://x", files=[("pictures", ('a"\r\n;ü.png', b"1"))], data={"seed": "1"})
    expected = {"pictures": [b"1"], "seed": "1"}
    assert parse_form(bytearray(request.read()), request.headers["content-type"], 2) == expected
    body = b'--"b: c\r\ncontent-disposition:form-data; filename="C:\\x.png"; name=pictures\r\n\r\n\r\n--"b: c--'
    assert parse_form(bytearray(body), 'multipart/form-data; boundary="\\"b: c"', 1) == {"pictures": [b""]}


def test_the_schema_of_forms_is_what_forms_accept(app):
    values = {"n_candidates": 2, "n_new_frames": 1, "context_frames": 3, "temperature": 0.5, "top_k": 9, "top_p": 0.9}
    values |= {"seed": 1, "output": "json"}
    model = protocol.bounded(protocol.GenerateRequest, protocol.BodySizes(3, 3, TOKENS))
    schema = protocol.form_schema(model)
    assert set(schema["properties"]) == {"pictures", *values} and schema["required"] == ["pictures"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["pictures"]["items"]["format"] == "binary"
    assert (schema["properties"]["pictures"]["minItems"], schema["properties"]["pictures"]["maxItems"]) == (1, 3)
    assert schema["properties"]["output"]["enum"] == ["json", "png", "stream"]
    for name, value in values.items():
        request = httpx.Request("POST", "http://x", **form(png(1), **{name: value}))
        read = model.model_validate(parse_form(bytearray(request.read()), request.headers["content-type"], 2))
        assert read.pictures == [png(1)] and getattr(read, name) == value and read.settings
        assert "null" not in json.dumps(schema["properties"][name])
    assert_error(post(app, "/generate", content=PART % (b"seed", b"1") + b"--b--", headers=FORM_HEADER), 422, "invalid")


def test_the_schema_in_the_document_is_that_of_each_content_type(app):
    paths = make_app_schema(app)["paths"]
    for path, files in {
        "/generate": ["pictures"],
        "/perplexity": ["pictures", "targets"],
        "/tokenize": ["pictures"],
    }.items():
        content = paths[path]["post"]["requestBody"]["content"]
        as_form, as_json = (content[kind]["schema"] for kind in ("multipart/form-data", "application/json"))
        assert as_form["required"] == files and not {"tokens", "target_tokens"} & set(as_form["properties"])
        assert "required" not in as_json
        for name in files:
            (images,) = [kind for kind in as_json["properties"][name]["anyOf"] if kind["type"] == "array"]
            assert images["items"] == {"type": "string", "contentEncoding": "base64"} and images["maxItems"] == 3
        assert post(app, path, files=[(name, png(1)) for name in files]).status_code == 200
        assert post(app, path, json={name: base64_of(png(1)) for name in files}).status_code == 200


def make_app_schema(app) -> dict:
    async def get():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return (await client.get("/openapi.json")).json()

    return asyncio.run(get())
