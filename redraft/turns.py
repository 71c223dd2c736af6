"""Turns of threads that share one engine."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Self


class Turns:
    """A lock that a thread holds for one step. A thread that takes turn after turn lets each waiting thread in between.

    `soon` runs a task between two turns and never waits. Finalisers use it: they may run in a thread that holds the turn.
    """

    def __init__(self) -> None:
        self._gate, self._lock = threading.Lock(), threading.Lock()
        self._tasks: deque[Callable[[], object]] = deque()

    def __enter__(self) -> Self:
        with self._gate:  # the thread that waits for the lock holds the gate, so the last holder cannot overtake it
            self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._settle()

    def soon(self, task: Callable[[], object]) -> None:
        """Runs `task` now if no turn is under way, else right after that turn."""
        self._tasks.append(task)
        self._settle()

    def _settle(self) -> None:
        while self._tasks and self._lock.acquire(blocking=False):
            try:
                while self._tasks:
                    self._tasks.popleft()()
            finally:
                self._lock.release()
