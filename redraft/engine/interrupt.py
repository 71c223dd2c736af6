"""Ctrl-C takes effect between steps, so that no step is left half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class InterruptBetween:
    """A context in which SIGINT is only remembered. Its end then raises KeyboardInterrupt.

    Does nothing outside the main thread, because Python delivers signals to the main thread only. Does nothing if SIGINT is ignored,
    as in background jobs.
    """

    def __init__(self) -> None:
        self._hit = False
        self._before: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._remember)
            if self._before is signal.SIG_IGN:
                self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._hit and callable(self._before):  # a second Ctrl-C takes effect at once
            self._before(number, frame)
        self._hit = True

    def _restore(self) -> None:
        """Sets the handler of before."""
        signal.signal(signal.SIGINT, self._before)
        self._before = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if (before := self._before) is None:
            return
        self._restore()
        if self._hit and kind is None:
            if not callable(before):
                raise KeyboardInterrupt
            before(signal.SIGINT, None)  # Python's own handler raises KeyboardInterrupt; a server's starts the shutdown
