"""Texts that leave the engine after their first new tokens, so that another one goes on with them.

A text is parked: it does not run any more, and its pages stay until another engine has copied them. What is parked counts as used
memory, so new requests wait if other engines take nothing over.
"""

from __future__ import annotations

from typing import NamedTuple

from redraft.core.sequence import Request, Sequence
from redraft.core.taps import NO_TAPS
from redraft.engine.output import Progress, Stats
from redraft.engine.parcel import Parcel
from redraft.errors import InvalidInput, shown
from redraft.models.runner import Runner


class Parked(NamedTuple):
    seq: Sequence
    progress: Progress


def travels(seq: Sequence) -> bool:
    """Whether the pages are all that a text has stored. A policy that evicts, watches attention or reads the context's states has a state
    of its own, and so has the repair of reused text, so their texts are computed again."""
    depth, read = seq.cache.depth, seq.cache.read
    repairs = seq.reusing is not None and seq.reusing.repair is not None
    return seq.cache.keep is None and (depth is None or depth.taps is NO_TAPS) and (read is None or not read.watches) and not repairs


class Departures:
    """Parked texts, by request and index."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.memory = runner, runner.memory
        self._parked: dict[str, dict[int, Parked]] = {}
        self._unready: dict[str, Request] = {}  # of which a text is parked, and others may still run
        self._ready: list[str] = []

    def park(self, seq: Sequence, progress: Progress) -> None:
        """A text with nothing stored is parked without pages."""
        request = seq.request
        if request.id not in self._parked:
            self._parked[request.id], self._unready[request.id] = {}, request
        self._parked[request.id][seq.index] = Parked(seq, progress)

    def unready(self) -> list[Request]:
        return list(self._unready.values())

    def settle(self, request: Request) -> None:
        """No text of the request runs or waits any more."""
        del self._unready[request.id]
        self._ready.append(request.id)

    @property
    def parked(self) -> int:
        """Requests with parked texts."""
        return len(self._parked)

    def ready(self) -> list[str]:
        """The requests that can be released, each once."""
        found, self._ready = [name for name in self._ready if name in self._parked], []
        return found

    def release(self, request_id: str) -> Parcel:
        parked = self._parked.get(request_id)
        if parked is None or request_id in self._unready:
            raise InvalidInput(f"request {shown(request_id)}: not parked; only a request that ready() named can be released")
        request = next(iter(parked.values())).seq.request
        progress, stored = [], []
        for seq in request.sequences:
            here = parked.get(seq.index)
            progress.append(Progress(seq.tokens[seq.prompt_len :], Stats(), True) if here is None else here.progress)
            stored.append(self.memory.export(seq) if here is not None and seq.stored else None)
        return Parcel.made(request, progress, stored, self.runner)

    def forget(self, request_id: str) -> bool:
        """Frees the pages of a request. Returns False if none of its texts is parked."""
        self._unready.pop(request_id, None)
        parked = self._parked.pop(request_id, {})
        for seq, _ in parked.values():
            if seq.stored:
                self.memory.free(seq)
        return bool(parked)
