"""How plugins fail: a plugin is called for a sequence through a `SafeCalls`, which turns an exception into a fault of that sequence.

The owner of the `SafeCalls` decides what a fault means. A fault of a drafter ends its drafts (guard.py). A fault of any other plugin
ends the request. BaseExceptions such as Ctrl-C pass through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import ParamSpec, TypeVar

from redraft.core.sequence import Request, Sequence

P = ParamSpec("P")
T = TypeVar("T")


class SafeCalls:
    """failed: called with each fault."""

    def __init__(self, failed: Callable[[Sequence, Exception], None]) -> None:
        self.failed = failed

    def call(self, seq: Sequence, part: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What `part` returns. If it raises, None, and `seq` is at fault."""
        try:
            return part(*args, **kwargs)
        except Exception as error:
            self.failed(seq, error)
            return None

    def call_for_all(self, seqs: Iterable[Sequence], part: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The same for a call that serves all `seqs`. If it raises, all of them are at fault."""
        try:
            return part(*args, **kwargs)
        except Exception as error:
            for seq in seqs:
                self.failed(seq, error)
            return None

    def call_each(self, seqs: Seq[Sequence], part: Callable[[list[int]], Seq[T]]) -> list[T | None]:
        """What `part` returns for all `seqs`, given their indices. If it raises, it is called again for each sequence alone. Sequences
        for which it raises again are at fault, and their entry is None."""
        places = list(range(len(seqs)))
        try:
            if len(seqs) > 1:
                return list(part(places))
        except Exception:
            pass
        alone = [self.call(seq, part, [place]) for seq, place in zip(seqs, places, strict=True)]
        return [None if found is None else found[0] for found in alone]


class Faults(SafeCalls):
    """Faults that end requests, collected until the end of the step. The first fault of a request counts. found: by request id."""

    def __init__(self) -> None:
        super().__init__(self.add)
        self.found: dict[str, tuple[Request, Exception]] = {}

    def add(self, seq: Sequence, error: Exception) -> None:
        self.found.setdefault(seq.request.id, (seq.request, error))

    def without(self, seqs: Seq[Sequence]) -> Seq[Sequence]:
        """The sequences of requests that are not at fault."""
        return [seq for seq in seqs if seq.request.id not in self.found] if self.found else seqs
