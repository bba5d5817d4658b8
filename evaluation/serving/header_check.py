"""Checks the headers of each request: its host, the origin of its page, and how its body is delimited.

Without the first check, a page of any web site could send requests to a server on the visitor's own machine: its domain
resolves to 127.0.0.1 (DNS rebinding), so that the browser treats the server as a part of that site.
"""

import re
from collections.abc import Callable

from EasyLM.errors import UserError
from EasyLM.flags import Flag
from evaluation.serving.limits import Message, Receive, Send, send_error
from evaluation.serving.request_errors import RequestError

ANY_HOST = "*"
LOCAL_HOSTS = "localhost,127.0.0.1,[::1]"
_ALL_INTERFACES = ("", "0.0.0.0", "::")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(?::\d+)?")
ALLOWED_HOSTS_FLAG = Flag(
    LOCAL_HOSTS,
    "Comma list of the host names and addresses, without port, by which clients may reach the server. --host is always "
    "one of them, or localhost if it stands for all interfaces. A request for another host, or from a web page of "
    "another host (header Origin), gets status 403. *: all; behind a proxy that checks them.",
)


def with_own_host(allowed_hosts: str, host: str) -> str:
    """Adds the address that the server listens on to a list of allowed hosts; localhost if that is all interfaces."""
    if allowed_hosts == ANY_HOST:
        return allowed_hosts
    own = "localhost" if host in _ALL_INTERFACES else f"[{host}]" if ":" in host else host
    return f"{allowed_hosts},{own}"


def check_allowed_hosts(allowed_hosts: str) -> frozenset[str]:
    """Returns the hosts of a comma list, in lower case.

    Raises:
      UserError: naming --allowed_hosts and an entry that is not a host.
    """
    hosts = [host.strip().lower() for host in allowed_hosts.split(",") if host.strip()]
    for host in hosts:
        if host != _host_of(host) or (host == ANY_HOST and len(hosts) > 1):
            raise UserError(
                f"--allowed_hosts={allowed_hosts}: {host!r} must be a host name or an address, without scheme and "
                "port, such as example.org or [::1]; or * alone"
            )
    if not hosts:
        raise UserError("--allowed_hosts is empty: name a host, such as localhost")
    return frozenset(hosts)


class HeaderCheck:
    """ASGI middleware. Refuses requests for other hosts, from pages of other hosts, or with contradictory lengths."""

    def __init__(self, app: Callable, allowed_hosts: str):
        """`allowed_hosts`: comma list of hosts; `ANY_HOST` turns the checks of host and origin off."""
        self._app, self._allowed = app, check_allowed_hosts(allowed_hosts)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or (error := self._error(scope["headers"])) is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send_error(error, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _error(self, headers: list[tuple[bytes, bytes]]) -> RequestError | None:
        names = {name.lower() for name, _ in headers}
        if {b"content-length", b"transfer-encoding"} <= names:
            # Servers and proxies disagree where such a body ends: the rest of it for one is a new request for another.
            return RequestError(400, "bad_request", "content-length and transfer-encoding together are not accepted")
        if ANY_HOST in self._allowed:
            return None
        hosts = [value.decode("latin-1") for name, value in headers if name.lower() == b"host"]
        if len(hosts) != 1 or _host_of(hosts[0]) not in self._allowed:
            return _forbidden("the host", ", ".join(hosts))
        for origin in [value.decode("latin-1") for name, value in headers if name.lower() == b"origin"]:
            scheme, _, host = origin.partition("://")
            if scheme.lower() not in ("http", "https") or _host_of(host) not in self._allowed:
                return _forbidden("the page's origin", origin)
        return None


def _host_of(value: str) -> str:
    """Returns the host of `host:port`, in lower case and without a final dot; empty if it is malformed."""
    match = _HOST.fullmatch(value.strip().lower())
    return match[1].removesuffix(".") if match else ""


def _forbidden(subject: str, value: str) -> RequestError:
    return RequestError(403, "forbidden", f"{subject} {value[:200]!r} is not allowed: see --allowed_hosts")
