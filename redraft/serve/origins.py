"""The host names and web pages that a server answers, so that a foreign web page cannot use a server on the user's machine."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.types import Scope

from redraft.serve.config import ServeConfig
from redraft.serve.errors import Refused

JSON = b"application/json"
FORM = b"application/x-www-form-urlencoded"  # what `curl -d` declares whatever it sends
READING = ("GET", "HEAD", "OPTIONS")


class Origins:
    """For a server on loopback, Host must be a loopback name, the server's own name or that of an allowed origin, because a foreign name
    that resolves to this machine is an attack (DNS rebinding). Browsers send a body that is not declared as JSON without a preflight
    request, so such a request must have no Origin, the server's own or an allowed one."""

    def __init__(self, config: ServeConfig) -> None:
        self.allowed = frozenset(origin.lower() for origin in config.allow_origins)
        self.local = config.uds is None and _loopback(config.host)
        self.hosts = {config.host.lower(), *(_name(origin.partition("://")[2]) for origin in self.allowed)}

    def check(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        """Refused (403) names the header. A body without a content type, or with that of a form, is declared to be JSON."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.local and host and "*" not in self.allowed and not (_loopback(name := _name(host)) or name in self.hosts):
            raise Refused(403, f"Host {host!r}: this server answers on loopback only; --allow-origins names others")
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] in READING or kind == JSON or kind.endswith(b"+json"):
            return
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and not {origin, "*"} & self.allowed and (not host or origin.partition("://")[2] != host):
            raise Refused(403, f"Origin {origin!r}: its pages may not use this server; --allow-origins names allowed ones")
        if b"content-type" not in headers or kind == FORM:
            others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            scope["headers"] = [*others, (b"content-type", JSON)]


def _name(host: str) -> str:
    """The host without the port; "" if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
