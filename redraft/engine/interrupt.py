"""Ctrl-C takes effect between steps, never within one: no step is half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class InterruptBetween:
    """While entered, SIGINT is remembered; `check` raises KeyboardInterrupt for it at a moment of the caller's choice.

    Does nothing outside the main thread, where Python delivers no signals, and where SIGINT is ignored, as in background jobs.
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
        if self._hit and callable(self._before):  # a second Ctrl-C does not wait
            self._before(number, frame)
        self._hit = True

    def check(self) -> None:
        if self._hit:
            self._hit = False
            if callable(self._before):
                self._before(signal.SIGINT, None)  # Python's own raises KeyboardInterrupt; a server's shuts down
            else:
                raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
