"""Engines that fail in every way that a process can. Imports little, because each test starts processes that import it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any, ClassVar

from redraft.bench.peers.peer import Job
from redraft.errors import RedraftError


class Fake:
    """Answers without computing. Its text differs from that of others unless `tokens` are given."""

    does = ("decode", "prefill", "steps")
    tokens = (1, 2, 3, 4, 5, 6, 7)

    def __init__(self, job: Job) -> None:
        self.job = job
        self.facts: dict[str, Any] = {"dtype": "float32", "pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}
        self.facts["isa"], self.facts["onednn"] = os.environ.get("REDRAFT_ISA"), os.environ.get("ONEDNN_MAX_CPU_ISA")
        print("libraries print")  # must not be read as an answer

    def decode(self) -> dict[str, Any]:
        return {"seconds": [9.0, 9.0, 0.5, 0.25, 0.5, 1.0], "tokens": list(self.tokens)}

    def prefill(self) -> dict[str, Any]:
        return {"seconds": 2.0}

    def margin(self, prompt: list[int], expected: int, found: int) -> dict[str, Any]:
        return {"margin": 0.5 + len(prompt), "near": 0.25}

    def steps(self) -> dict[str, Any]:
        return {"seconds": {rows: 0.1 * rows for rows in self.job.rows}}


class Raises(Fake):
    def prefill(self) -> dict[str, Any]:
        raise ValueError("no prefill today")


class Dies(Fake):
    def decode(self) -> dict[str, Any]:
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


class Refuses(Fake):
    def __init__(self, job: Job) -> None:
        raise RedraftError("cannot load this")


class Sleeps(Fake):
    def decode(self) -> dict[str, Any]:
        time.sleep(100)
        return {}


class Spins(Fake):
    """Has another thread at work."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        threading.Thread(target=self._spin, daemon=True).start()

    def _spin(self) -> None:
        while True:
            time.sleep(0.001)


class Other(Fake):
    tokens = (1, 2, 9, 4, 5, 6, 7)


class Bounds(Fake):
    does = ("bandwidth", "peak")

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.facts["how"] = "nobody"

    def bandwidth(self) -> dict[str, Any]:
        return {"bytes_per_second": 1e10}

    def peak(self) -> dict[str, Any]:
        return {"flops_per_second": {"float32": 1e11}}


class Writes(Fake):
    """Each text is its prompt reversed; in the mode "odd" a prompt that begins with 9 gets another one. Reports what it was given."""

    does = ("generate",)
    speed: ClassVar[dict[str, float]] = {"plain": 1.0, "auto": 2.0, "odd": 4.0}

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.facts["version"] = "7"

    def generate(self, mode: str, prompt: list[int], tokens: int) -> dict[str, Any]:
        if mode == "broken":
            raise ValueError("no such mode today")
        text = [0] if mode == "odd" and prompt[0] == 9 else prompt[::-1][:tokens]
        return {"seconds": len(text) / self.speed[mode], "tokens": text, "note": f"fake {mode}" if mode == "auto" else ""}


class Faints(Writes):
    """Dies in its mode "odd" with the second text."""

    def generate(self, mode: str, prompt: list[int], tokens: int) -> dict[str, Any]:
        if mode == "odd" and prompt[0] == 9 and tokens > 8:
            print("last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(mode, prompt, tokens)
