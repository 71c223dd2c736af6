"""Ctrl-C takes effect between steps, so that no step is left half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class InterruptBetween:
    """A context in which SIGINT is only remembered. `check` then raises KeyboardInterrupt.

    Does nothing outside the main thread, because Python delivers signals to the main thread only. Does nothing if SIGINT is ignored,
    as in background jobs.
    """

    def __init__(self) -> None:
        self._hit = False
        self._before: Any = None

    def __enter__(self) -> InterruptBetween:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._before = signal.signal(signal.SIGINT, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._hit and callable(self._before):  # a second Ctrl-C takes effect at once
            self._before(number, frame)
        self._hit = True

    def check(self) -> None:
        if self._hit:
            self._hit = False
            if callable(self._before):
                self._before(signal.SIGINT, None)  # Python's own handler raises KeyboardInterrupt; a server's starts the shutdown
            else:
                raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
