"""The host, the origin and the length of a request: of other sites, or contradictory, they are refused."""

import asyncio
import re

import pytest
from serve_kit import SECONDS, ask, assert_error, exchange, serve_while

from EasyLM.errors import UserError
from evaluation.serving import Limits
from evaluation.serving.app import make_app
from evaluation.serving.header_check import LOCAL_HOSTS, HeaderCheck, check_allowed_hosts, with_own_host


@pytest.fixture(scope="module")
def local_app(engine):
    return make_app(engine, Limits(read_seconds=SECONDS), allowed_hosts=LOCAL_HOSTS)


def status_of(app, headers: dict[str, str], method: str = "GET", path: str = "/ready") -> int:
    return ask(app, (method, path, {"headers": headers}))[0].status_code


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:80", "[::1]:8000", "localhost."]
)
def test_local_hosts_are_allowed(local_app, host):
    assert status_of(local_app, {"host": host}) == 503  # warming up
    assert status_of(local_app, {"host": host, "origin": f"http://{host}"}) == 503


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "localhost@evil.example",
        "localhost:8@evil.example",
        "127.0.0.1.nip.io",
        "10.1.2.3",
        "[::2]",
        "::1",
        "localhost:x",
        "localhost,evil.example",
        "*",
        "",
    ],
)
def test_other_hosts_are_refused(local_app, host):
    answers = ask(local_app, *(("GET", path, {"headers": {"host": host}}) for path in ("/ready", "/docs")))
    for answer in [
        *answers,
        *ask(local_app, ("POST", "/generate", {"headers": {"host": host}, "content": b"x" * 999})),
    ]:
        assert_error(answer, 403, "forbidden", "the host", "--allowed_hosts")


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "https://localhost.evil.example", "null", "file://", "localhost", "ftp://localhost"],
)
def test_pages_of_other_origins_are_refused(local_app, origin):
    for method, path in (("GET", "/ready"), ("POST", "/generate")):
        answer = ask(local_app, (method, path, {"headers": {"host": "localhost", "origin": origin}}))[0]
        assert_error(answer, 403, "forbidden", "the page's origin", "--allowed_hosts")


def test_named_hosts_are_allowed(engine):
    app = make_app(engine, allowed_hosts=with_own_host("example.org, Lab.example", "10.1.2.3"))
    for host in ("example.org:8000", "lab.example", "10.1.2.3:8000"):
        assert status_of(app, {"host": host, "origin": "https://example.org"}) == 503
    assert status_of(app, {"host": "localhost"}) == 403
    assert with_own_host("a.b", "0.0.0.0") == with_own_host("a.b", "::") == "a.b,localhost"
    assert check_allowed_hosts(with_own_host("a.b", "::1")) == {"a.b", "[::1]"}
    anyone = make_app(engine, allowed_hosts="*")
    assert status_of(anyone, {"host": "evil.example", "origin": "null"}) == 503


@pytest.mark.parametrize("hosts", ["", " , ", "http://localhost", "localhost:8000", "a b", "*,localhost", "::1"])
def test_wrong_lists_of_hosts_are_named(hosts):
    with pytest.raises(UserError, match="--allowed_hosts"):
        check_allowed_hosts(hosts)


def test_websockets_of_other_origins_are_closed():
    sent = []

    async def scenario(headers):
        async def app(scope, receive, send):
            sent.append("opened")

        async def send(message):
            sent.append(message["type"])

        await HeaderCheck(app, LOCAL_HOSTS)({"type": "websocket", "headers": headers}, None, send)

    asyncio.run(scenario([(b"host", b"localhost"), (b"origin", b"http://evil.example")]))
    asyncio.run(scenario([(b"host", b"localhost"), (b"origin", b"http://localhost:1")]))
    assert sent == ["websocket.close", "opened"]


HEAD = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SMUGGLED = b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n"
SMUGGLING = {
    "both, the length first": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both, the encoding first": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "both, in capitals": b"CONTENT-LENGTH: 0\r\nTRANSFER-ENCODING: Chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 2\r\nContent-Length: 0\r\n\r\n{}",
    "a list of lengths": b"Content-Length: 2, 0\r\n\r\n{}",
    "a signed length": b"Content-Length: +2\r\n\r\n{}",
    "another encoding": b"Transfer-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}",
    "two encodings": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "a space before the colon": b"Transfer-Encoding : chunked\r\nContent-Length: 2\r\n\r\n{}",
    "no host": b"",
}


@pytest.mark.parametrize("name", SMUGGLING)
def test_a_body_whose_end_is_ambiguous_ends_the_connection(local_app, name):
    """The bytes after it are never taken for another request."""
    request = HEAD + SMUGGLING[name] if name != "no host" else b"GET /ready HTTP/1.1\r\n\r\n"

    async def scenario(port, server):
        return await asyncio.wait_for(exchange(port, request + SMUGGLED), 10)

    answer = asyncio.run(serve_while(local_app, Limits(read_seconds=SECONDS), scenario))
    statuses = re.findall(rb"HTTP/1.1 (\d+)", answer)
    assert len(statuses) == 1 and statuses[0] in (b"400", b"501"), answer


def test_another_host_is_refused_over_a_socket(local_app):
    async def scenario(port, server):
        requests = [
            b"GET /ready HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % host for host in (b"localhost", b"e.x")
        ]
        requests.append(b"GET /ready HTTP/1.0\r\n\r\n")
        return [await asyncio.wait_for(exchange(port, request), 10) for request in requests]

    answers = asyncio.run(serve_while(local_app, Limits(read_seconds=SECONDS), scenario))
    assert [re.findall(rb"HTTP/1.1 (\d+)", answer) for answer in answers] == [[b"503"], [b"403"], [b"403"]]
