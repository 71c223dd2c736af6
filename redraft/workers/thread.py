"""A thread that steps an engine. Only that thread touches the engine: others give it tasks, which it runs between two steps, so that an
aborted request holds no page after the current step."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import Any

from redraft.engine.engine import Engine
from redraft.engine.output import Event

log = logging.getLogger("redraft.workers")
LONGEST_STEP = 10.0  # seconds to wait for it at the end; a thread that hangs must not keep the process


class EngineThread:
    """deliver: gets the events of each step; dead: what ended the thread; stepped: comes after each step. All are called in the thread."""

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[list[Event]], None],
        dead: Callable[[BaseException], None],
        stepped: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.deliver, self.dead, self.stepped = engine, deliver, dead, stepped
        self.died: BaseException | None = None
        self._tasks: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._end = False
        self._busy_since: float | None = None  # when the current step or task began; None: the thread waits
        self._thread = threading.Thread(target=self._main, name="redraft-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self.died is None and self._thread.is_alive()

    @property
    def busy(self) -> float:
        """Seconds since the thread began its current step or task, 0 if it waits."""
        since = self._busy_since
        return 0.0 if since is None else monotonic() - since

    def do(self, task: Callable[[], Any]) -> None:
        """Runs it between two steps. What it raises ends the thread."""
        with self._wake:
            self._tasks.append(task)
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        def abort() -> None:
            try:
                self.engine.abort(request_id)
            except Exception:  # if ending one request raises, the others continue
                log.exception("request %s did not end well", request_id)

        self.do(abort)

    def stop(self) -> None:
        """Ends the thread after the current step, and waits for that."""
        self._end = True
        self.do(lambda: None)
        self._thread.join(LONGEST_STEP)

    def _main(self) -> None:
        try:
            while not self._end:
                self._busy_since = None
                if not self._tasks and not self.engine.has_work:
                    more = self.engine.idle()
                    with self._wake:
                        while not (self._tasks or self.engine.has_work or more):
                            self._wake.wait()
                while self._tasks:
                    self._busy_since = monotonic()
                    self._tasks.popleft()()
                if self.engine.has_work and not self._end:
                    self._busy_since = monotonic()
                    self._step()
        except BaseException as error:
            self.died = error
            log.critical("the engine's thread died", exc_info=error)
            self.dead(error)

    def _step(self) -> None:
        if events := self.engine.step():  # copies, because this thread continues to change the statistics
            self.deliver([replace(event, stats=event.stats.copy()) for event in events])
        self.stepped()
