"""The front's side of a worker: begin it, send to it, receive from it, end it."""

from __future__ import annotations

import asyncio
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Protocol

from redraft.workers.message import Begin
from redraft.workers.process import HEAD, framed

PATIENCE = 2.0  # seconds in which a worker without a connection ends by itself


class Link(Protocol):
    """To one life of a worker: a worker that starts again gets a new link. All is called in the event loop. killed: whether the worker was
    ended from outside, by SIGKILL or SIGTERM, which is no fault of a request; known when it is gone."""

    killed: bool

    def start(self, begin: Begin, receive: Callable[[Any], None], ended: Callable[[], None]) -> None:
        """receive: gets each message; ended: is called once, when the worker is gone."""
        ...

    def send(self, message: Any) -> None:
        """Does not wait. What is sent to a worker that is gone is lost."""
        ...

    def kill(self) -> None:
        """Ends the worker at once."""
        ...


class Process:
    """A worker process on this machine."""

    killed = False

    def start(self, begin: Begin, receive: Callable[[Any], None], ended: Callable[[], None]) -> None:
        self._receive, self._ended = receive, ended
        ours, theirs = socket.socketpair()
        try:
            command = [sys.executable, "-m", "redraft.workers.process", str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        finally:
            theirs.close()
        ours.setblocking(False)
        self._writer: asyncio.StreamWriter | None = None
        self._early = [framed(begin)]
        self._task = asyncio.create_task(self._run(ours))

    def send(self, message: Any) -> None:
        if self._writer is None:
            self._early.append(framed(message))
        elif not self._writer.is_closing():
            self._writer.write(framed(message))

    def kill(self) -> None:
        self.process.kill()

    async def _run(self, ours: socket.socket) -> None:
        reader, self._writer = await asyncio.open_connection(sock=ours)
        for data in self._early:
            self._writer.write(data)
        try:
            while True:
                size = HEAD.unpack(await reader.readexactly(HEAD.size))[0]
                self._receive(pickle.loads(await reader.readexactly(size)))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._writer.close()
            try:
                code = await asyncio.to_thread(self.process.wait, PATIENCE)
                self.killed = -code in (signal.SIGKILL, signal.SIGTERM)
            except subprocess.TimeoutExpired:
                self.process.kill()  # it hangs without a connection
                await asyncio.to_thread(self.process.wait)
            self._ended()
