"""A server listens before its model loads."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from redraft.errors import InvalidInput
from redraft.serve.config import ServeConfig
from redraft.serve.listen import listen


def test_a_port_in_use_is_named() -> None:
    (one,) = listen(ServeConfig(port=0))
    with one:
        assert one.proto == socket.IPPROTO_TCP  # else asyncio does not disable Nagle's algorithm
        port = one.getsockname()[1]
        with pytest.raises(InvalidInput, match=f"port = {port}: in use"):
            listen(ServeConfig(port=port))
        socket.create_connection(("127.0.0.1", port)).close()
    for again in listen(ServeConfig(port=port)):  # at once, although a connection was open
        again.close()


def test_a_name_of_several_addresses_has_one_port() -> None:
    made = listen(ServeConfig(host="localhost", port=0))
    assert len({one.getsockname()[1] for one in made}) == 1
    for one in made:
        one.close()


def test_a_host_that_is_not_here() -> None:
    with pytest.raises(InvalidInput, match=r"host = '192\.0\.2\.1'"):
        listen(ServeConfig(host="192.0.2.1", port=0))
    with pytest.raises(InvalidInput, match=r"host = 'x+\.\.\.: is no name of a host"):
        listen(ServeConfig(host="x" * 300, port=0))


def test_a_unix_socket_and_what_is_left_of_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for _ in range(2):  # the second finds the file of the first
        (one,) = listen(ServeConfig(uds=path))
        with pytest.raises(InvalidInput, match="in use"):
            listen(ServeConfig(uds=path))
        one.close()
    path.unlink()
    path.write_text("mine")
    with pytest.raises(InvalidInput, match="in use"):
        listen(ServeConfig(uds=path))
    assert path.read_text() == "mine"
