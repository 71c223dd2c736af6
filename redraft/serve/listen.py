"""Sockets of a server. They listen before the model loads, so that a port in use is an error at once."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Any

from redraft.errors import InvalidInput, shown
from redraft.serve.config import ServeConfig

BACKLOG = 2048  # connections that wait to be accepted


def listen(serve: ServeConfig) -> list[socket.socket]:
    """One socket for each address of the host, or the unix socket. InvalidInput names host and port, or the path."""
    if serve.uds is not None:
        return [_listen_unix(serve.uds)]
    made: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, _, protocol, _, address in socket.getaddrinfo(serve.host, serve.port, type=socket.SOCK_STREAM):
            port = address[1] or (made[0].getsockname()[1] if made else 0)  # one port for all addresses of a name
            try:
                made.append(_listen_at(family, protocol, (address[0], port, *address[2:])))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                absent = error  # such as ::1 of localhost, where IPv6 is off
        if absent is not None and not made:
            raise absent
    except UnicodeError:
        raise InvalidInput(f"host = {shown(serve.host)}: is no name of a host") from None
    except OSError as error:
        for one in made:
            one.close()
        reason = "in use; choose another port, or 0 for any free one" if error.errno == errno.EADDRINUSE else error.strerror
        raise InvalidInput(f"host = {serve.host!r}, port = {serve.port}: {reason}") from None
    return made


def _listen_at(family: int, protocol: int, address: Any) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM, protocol)  # asyncio disables Nagle's algorithm only if the protocol is given
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
        one.listen(BACKLOG)
    except OSError:
        one.close()
        raise
    return one


def _listen_unix(path: Path) -> socket.socket:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and one.connect_ex(str(path)):  # left over from a dead process: nothing answers there
            path.unlink()
            one.close()
            one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        one.bind(str(path))
        path.chmod(0o666)
        one.listen(BACKLOG)
    except OSError as error:
        one.close()
        reason = "in use" if error.errno in (errno.EADDRINUSE, errno.EISCONN, errno.EINVAL) else error.strerror
        raise InvalidInput(f"uds = {str(path)!r}: {reason}") from None
    return one
