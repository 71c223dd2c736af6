"""A worker in a process of its own: `python -m redraft.workers.process FD`, where FD is a socket to the front. It ends with the front."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import struct
import sys
import threading
from typing import Any

HEAD = struct.Struct("!Q")  # of a message: its length in bytes


class Channel:
    """Pickled messages over a socket to a process of one's own."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._lock = threading.Lock()

    def send(self, message: Any) -> None:
        """From any thread. OSError if the other side is gone."""
        with self._lock:
            self.socket.sendall(framed(message))

    def receive(self) -> Any:
        """EOFError if the other side is gone."""
        return pickle.loads(self._exactly(HEAD.unpack(self._exactly(HEAD.size))[0]))

    def _exactly(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            try:
                part = self.socket.recv(size - len(found))
            except OSError:
                part = b""
            if not part:
                raise EOFError
            found += part
        return bytes(found)


def framed(message: Any) -> bytes:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return HEAD.pack(len(data)) + data


def main(descriptor: int) -> None:
    for one in (signal.SIGINT, signal.SIGTERM):  # of a terminal or of systemd, which signal all processes: the front ends its workers
        signal.signal(one, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=descriptor))
    begin = channel.receive()
    if begin.cores is not None:
        os.sched_setaffinity(0, begin.cores)

    from redraft.errors import RedraftError
    from redraft.kv.shared import SharedMemory, SharedPages
    from redraft.llm import LLM
    from redraft.workers.message import Failed, Stop
    from redraft.workers.worker import Worker

    try:
        shared = SharedMemory() if begin.shares else None
        llm = LLM(config=begin.config, room=None if shared is None else shared.room)
        llm.engine.policies.check(begin.check)
    except RedraftError as error:
        channel.send(Failed(error))
        return
    source = "" if shared is None else shared.path
    worker = Worker(llm, channel.send, lambda: os._exit(1), source, lambda llm, path: SharedPages(llm.engine.memory, path))
    worker.start()
    try:
        while not isinstance(message := channel.receive(), Stop):
            worker.take(message)
        worker.stop()
    except EOFError:
        pass
    sys.stderr.flush()
    os._exit(0)  # a step that still runs is for nobody


if __name__ == "__main__":
    main(int(sys.argv[1]))
