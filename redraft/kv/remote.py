"""Pages over TCP: a server in the process of one engine, and the source with which another engine reads them.

Both know a secret. Each proves it to the other with an HMAC over fresh random numbers of both, and a key from these authenticates every
later message with its length, direction and number. Nothing is encrypted. A message is

    length of the content (8 bytes) | HMAC-SHA256 (32 bytes) | content

The client asks with JSON: the space and the pages. The server answers with the length of a JSON header (4 bytes), the header, and the
arrays that it names, one after the other; or with a header that says why not.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Sequence as Seq
from contextlib import suppress
from math import prod
from time import monotonic
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401, names its types to NumPy
import numpy as np

from redraft.core.sequence import Lanes, Space
from redraft.core.tree import I32
from redraft.kv.memory import Memories
from redraft.kv.paged import Paged
from redraft.kv.parcel import Lost
from redraft.kv.store import AT_ONCE
from redraft.ops.arrays import array
from redraft.ops.format import Arrays

log = logging.getLogger(__name__)

MAGIC = b"redraft pages 1\n"
NONCE, TAG = 32, 32  # bytes
MOST_ASKED = 1 << 20  # bytes of a question
PATIENCE = 5.0  # seconds for each part of a message
REST = 5.0  # seconds in which a server that failed is not asked again
MOST_CLIENTS = 256


class Address(NamedTuple):
    host: str
    port: int


class _Link:
    """A connection after both sides have proved that they know the secret."""

    def __init__(self, connection: socket.socket, secret: bytes, *, server: bool) -> None:
        self.connection, self._server = connection, server
        connection.settimeout(PATIENCE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        mine = os.urandom(NONCE)
        if server:
            connection.sendall(MAGIC + mine)
            theirs = bytes(self._receive(NONCE))
            nonces = mine + theirs
        else:
            if self._receive(len(MAGIC)) != MAGIC:
                raise Lost("what answers is not a server of pages")
            theirs = bytes(self._receive(NONCE))
            nonces = theirs + mine
        proofs = {kind: hmac.digest(secret, kind + nonces, "sha256") for kind in (b"client", b"server", b"key")}
        if not server:
            connection.sendall(mine + proofs[b"client"])
        if not hmac.compare_digest(self._receive(TAG), proofs[b"client" if server else b"server"]):
            raise Lost("the other side does not know the secret")
        if server:
            connection.sendall(proofs[b"server"])
        self._key, self._sent, self._received = proofs[b"key"], 0, 0

    def send(self, parts: Seq[bytes | memoryview]) -> None:
        length = struct.pack("<Q", sum(map(len, parts)))
        tag = hmac.new(self._key, self._about(self._server, self._sent) + length, "sha256")
        for part in parts:
            tag.update(part)
        self._sent += 1
        self.connection.sendall(length + tag.digest())
        for part in parts:
            self.connection.sendall(part)

    def receive(self, most: int, *, wait: bool = False) -> bytearray:
        """wait: for as long as it takes until the message begins."""
        self.connection.settimeout(None if wait else PATIENCE)
        start = self._receive(8)
        self.connection.settimeout(PATIENCE)
        (length,) = struct.unpack("<Q", start)
        if length > most:
            raise Lost(f"a message of {length} bytes, at most {most} are expected")
        tag, content = self._receive(TAG), self._receive(length)
        expected = hmac.new(self._key, self._about(not self._server, self._received) + start, "sha256")
        expected.update(content)
        if not hmac.compare_digest(tag, expected.digest()):
            raise Lost("a message that was changed on its way")
        self._received += 1
        return content

    def _about(self, server: bool, number: int) -> bytes:
        return (b"server" if server else b"client") + struct.pack("<Q", number)

    def _receive(self, count: int) -> bytearray:
        found = bytearray(count)
        view, at = memoryview(found), 0
        while at < count:
            if not (got := self.connection.recv_into(view[at:])):
                raise ConnectionResetError("the other side closed the connection")
            at += got
        return found


class PageServer:
    """Lets clients that know `secret` read pages of `memory`, in threads of its own. address: where it listens; port 0: any free one."""

    def __init__(self, memory: Paged | Memories, secret: bytes, host: str = "127.0.0.1", port: int = 0) -> None:
        assert len(secret) >= 16, "a secret of 16 bytes or more is needed"
        self.memory, self._secret = memory, secret
        self._listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.address = Address(*self._listener.getsockname()[:2])
        self._clients: set[socket.socket] = set()
        threading.Thread(target=self._accept, name="redraft-pages", daemon=True).start()

    def close(self) -> None:
        for one in (self._listener, *list(self._clients)):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            if len(self._clients) >= MOST_CLIENTS:
                connection.close()
                continue
            self._clients.add(connection)
            threading.Thread(target=self._serve, args=(connection,), name="redraft-pages", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                link = _Link(connection, self._secret, server=True)
                while True:
                    link.send(self._answer(link.receive(MOST_ASKED, wait=True)))
        except OSError as error:
            log.debug("a client of pages left: %s", error)
        finally:
            self._clients.discard(connection)

    def _answer(self, asked: bytearray) -> list[bytes | memoryview]:
        try:
            lanes, name, pages = json.loads(asked)
            found = self.memory.read(Space(Lanes(lanes), name), np.array(pages, np.int32))
        except (Lost, ValueError, TypeError, OverflowError) as error:
            return [*_header({"error": str(error)})]
        held = {name: np.ascontiguousarray(array(one)) for name, one in found.items()}
        about = [[name, one.dtype.name, list(one.shape)] for name, one in held.items()]
        return [*_header({"arrays": about}), *(one.reshape(-1).view(np.uint8).data for one in held.values())]


class RemotePages:
    """A source (engine/parcel.py): the pages of another engine's PageServer. memory: that of the engine that reads. A thread at a time may
    use it. A server that failed is not asked again for REST seconds, so that texts are not held up by one that is gone."""

    def __init__(self, memory: Paged | Memories, address: tuple[str, int], secret: bytes) -> None:
        self.address, self._secret = Address(*address), secret
        self._most = 4 * AT_ONCE * memory.paged.store.block_bytes + MOST_ASKED
        self._link: _Link | None = None
        self._failed = -REST

    def read(self, space: Space, pages: I32) -> Arrays:
        if monotonic() - self._failed < REST:
            raise Lost(f"{self.address.host}:{self.address.port} did not answer lately")
        try:
            if self._link is None:
                self._link = self._connected()
            self._link.send([json.dumps([space.lanes, space.format, pages.tolist()]).encode()])
            content = self._link.receive(self._most)
        except OSError as error:
            self._failed = monotonic()
            self.close()
            raise Lost(f"{self.address.host}:{self.address.port}: {error}") from error
        return _arrays(content)

    def close(self) -> None:
        if self._link is not None:
            self._link.connection.close()
        self._link = None

    def _connected(self) -> _Link:
        connection = socket.create_connection(self.address, PATIENCE)
        try:
            return _Link(connection, self._secret, server=False)
        except BaseException:
            connection.close()
            raise


def _header(about: dict[str, Any]) -> tuple[bytes, bytes]:
    text = json.dumps(about).encode()
    return struct.pack("<I", len(text)), text


def _arrays(content: bytearray) -> Arrays:
    """Of an answer. Lost if it says why there are none, or if it is not whole."""
    try:
        (size,) = struct.unpack_from("<I", content)
        about, at = json.loads(content[4 : 4 + size]), 4 + size
        if "error" in about:
            raise Lost(about["error"])
        found = {}
        for name, dtype, shape in about["arrays"]:
            count = prod(shape)
            found[name] = np.frombuffer(content, np.dtype(dtype), count, at).reshape(shape)
            at += found[name].nbytes
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise Lost(f"an answer that is not whole: {error}") from None
    if at != len(content):
        raise Lost(f"an answer of {len(content)} bytes with arrays of {at}")
    return found
