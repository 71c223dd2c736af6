"""An engine in its own process. The process runs only during a call."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import IO, Any

from redraft.bench.peers.peer import Job
from redraft.errors import RedraftError


class Lost(RedraftError):
    """An engine raised, died or did not answer in time. The text says why."""


class Raised(Lost):
    """An engine raised, and its process goes on."""


class Worker:
    """One process. It is stopped (SIGSTOP) between calls."""

    def __init__(self, target: str, job: Job, environment: Mapping[str, str], timeout: float) -> None:
        self.timeout, self._rest = timeout, b""
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "redraft.bench.peers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, **environment},
            start_new_session=True,  # its own process group, to stop all threads together; Ctrl-C reaches only the parent, which ends it
        )
        try:
            loaded = self.ask({"target": target, "job": dataclasses.asdict(job)})
        except BaseException:
            self.end()
            raise
        self.facts: dict[str, Any] = loaded["facts"]
        self.does: list[str] = loaded["does"]

    def ask(self, message: Mapping[str, Any]) -> Any:
        """Sends a message and returns the answer. The process runs only meanwhile. Raises Lost without an answer, Raised with an error."""
        assert self.process.stdin is not None
        try:
            self._signal(signal.SIGCONT)
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
            answer = json.loads(self._line())
        except OSError:
            raise Lost(self._last_words()) from None
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise Raised(answer["error"])
        return answer["ok"]

    def end(self) -> None:
        self._signal(signal.SIGKILL)  # works on a stopped process, too
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self._stderr):
            assert pipe is not None
            with contextlib.suppress(OSError):  # unwritten data has no reader any more
                pipe.close()

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        until, pipe = time.monotonic() + self.timeout, self.process.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
                raise Lost(f"no answer within {self.timeout:g} seconds")
            if not (more := os.read(pipe, 1 << 16)):
                raise Lost(self._last_words())
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _last_words(self) -> str:
        try:
            code: int | None = self.process.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        how = "closed its pipe" if code is None else f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"{how}: {lines[-1]}" if lines else how

    def _signal(self, what: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, what)
