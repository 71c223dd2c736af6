"""Texts that began in another engine and whose pages are still there. They wait like others and are copied when they are admitted."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, NamedTuple

from redraft.core.sequence import Sequence
from redraft.engine.parcel import Source
from redraft.models.runner import Runner

log = logging.getLogger(__name__)


class Expected(NamedTuple):
    stored: Any
    source: Source


class Arrivals:
    """copied: tokens whose pages were copied; found: tokens that the prefix cache had already; lost: texts whose pages could not be copied,
    which were computed again."""

    def __init__(self, runner: Runner) -> None:
        self.memory = runner.memory
        self.copied = self.found = self.lost = 0
        self._expected: dict[int, Expected] = {}
        self._left: Counter[str] = Counter()  # expected texts of each request
        self._settled: list[str] = []

    @property
    def awaited(self) -> int:
        """Texts that were not admitted yet."""
        return len(self._expected)

    def expect(self, seq: Sequence, stored: Any, source: Source) -> None:
        """The pages of all tokens of `seq` but the last are in `source`."""
        self._expected[seq.id] = Expected(stored, source)
        self._left[seq.request.id] += 1

    def settle(self, request_id: str) -> None:
        """Notes whether the request needs its source no more. Once for each request without expected texts."""
        if not self._left[request_id]:
            del self._left[request_id]
            self._settled.append(request_id)

    def open(self, seq: Sequence, matched: int) -> None:
        """Opens `seq` with the first `matched` tokens from the prefix cache. If it is expected, with all that the prefix cache has by now,
        and copies of the other pages. If the copy fails, it is not tried again. After an error `seq` is not open."""
        if (expected := self.drop(seq)) is not None:
            matched = self._matched(seq)
            try:
                self.memory.import_(seq, expected.stored, matched, expected.source.read)
                self.memory.publish(seq)  # other texts of the request are admitted in the same step
            except OSError as error:
                self.lost += 1
                log.warning("request %s: its pages did not arrive, so text %d is computed again: %s", seq.request.id, seq.index, error)
            else:
                seq.reuse_searched = True  # what there was to reuse is in the pages
                self.found += matched
                self.copied += seq.stored - matched
                return
        self.memory.open(seq)
        try:
            if matched:
                self.memory.attach(seq, matched)
        except BaseException:
            self.memory.free(seq)
            raise

    def _matched(self, seq: Sequence) -> int:
        """Pages of earlier arrivals of the same step may have replaced those that the plan matched."""
        return self.memory.match(seq.tokens[: seq.skippable + 1], seq.request.salt) if seq.skippable else 0

    def drop(self, seq: Sequence) -> Expected | None:
        """Nothing of this text is needed any more, or it is copied now."""
        found, seq.arrives = self._expected.pop(seq.id, None), 0
        if found is not None:
            self._left[seq.request.id] -= 1
            self.settle(seq.request.id)
        return found

    def settled(self) -> list[str]:
        """The requests that need their sources no more, each once."""
        found, self._settled = self._settled, []
        return found
