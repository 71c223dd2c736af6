"""Texts whose first pages are elsewhere: in another engine, where they began, or on disk. They wait like others, and the pages are copied
when they are admitted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence as Seq
from time import perf_counter
from typing import Any, NamedTuple

from redraft.core.sequence import Sequence
from redraft.engine.parcel import Source
from redraft.kv.disk.pages import Broken, DiskPages, Found
from redraft.kv.reuse.reuse import Reusing
from redraft.models.runner import Runner

log = logging.getLogger(__name__)


class Expected(NamedTuple):
    stored: Any
    source: Source


class Arrivals:
    """copied: tokens whose pages were copied; found: tokens that the prefix cache had already; lost: texts whose pages could not be copied,
    which were computed again."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.memory = runner, runner.memory
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

    def look(self, seq: Sequence) -> None:
        """Notes how many leading tokens of a text that begins to wait are on disk."""
        if self.runner.disk is not None and seq.skippable and seq.id not in self._expected:
            seq.arrives = self.on_disk(seq.tokens[: seq.skippable + 1], seq.request.salt)

    def on_disk(self, tokens: Seq[int], salt: str) -> int:
        """How many leading tokens, at most all but one, the prefix cache and the disk have together; 0 if the disk adds nothing."""
        if (disk := self.runner.disk) is None:
            return 0
        found = disk.find(tokens, salt, self.runner.table.prefix.walk(tokens, salt))
        return (found.attached + len(found)) * disk.page if len(found) else 0

    def settle(self, request_id: str) -> None:
        """Notes whether the request needs its source no more. Once for each request without expected texts."""
        if not self._left[request_id]:
            del self._left[request_id]
            self._settled.append(request_id)

    def open(self, seq: Sequence, matched: int) -> None:
        """Opens `seq` with the first `matched` tokens from the prefix cache. If it is expected, with all that the prefix cache has by now,
        and copies of the other pages. If the copy fails, it is not tried again. After an error `seq` is not open."""
        on_disk = seq.arrives if seq.id not in self._expected else 0
        if (expected := self.drop(seq)) is not None:
            matched = self._matched(seq)
            try:
                self.memory.import_(seq, expected.stored, matched, expected.source.read)
                self.memory.publish(seq)  # other texts of the request are admitted in the same step
            except OSError as error:
                self.lost += 1
                log.warning("request %s: its pages did not arrive, so text %d is computed again: %s", seq.request.id, seq.index, error)
            else:
                seq.reusing = Reusing()  # what there was to reuse is in the pages
                self.found += matched
                self.copied += seq.stored - matched
                return
        if on_disk and self.runner.disk is not None:
            matched, found = self._found(seq, matched, on_disk, self.runner.disk)
            if self._read(seq, found):
                return
        self.memory.open(seq)
        try:
            if matched:
                self.memory.attach(seq, matched)
        except BaseException:
            self.memory.free(seq)
            raise

    def _found(self, seq: Sequence, matched: int, planned: int, disk: DiskPages) -> tuple[int, Found]:
        """The tokens to attach from the prefix cache, and what is on disk behind them: with it, no more than was planned."""
        now = min(self._matched(seq), max(matched, planned))
        matched = now if seq.cache.keep is None else min(now, matched)  # evictions copy pages that others list: no more of these
        tokens, salt = seq.tokens[: min(seq.skippable, max(matched, planned)) + 1], seq.request.salt
        return matched, disk.find(tokens, salt, self.runner.table.prefix.walk(tokens, salt)[: matched // disk.page])

    def _read(self, seq: Sequence, found: Found) -> bool:
        """Opens `seq` with pages of the prefix cache and those on disk behind them. False, and nothing is open, if there are none there."""
        began, size, disk = perf_counter(), found.disk.page, found.disk
        while len(found):
            try:
                self.memory.paged.import_(seq, found.stored, found.attached * size, found.read)
            except Broken as error:
                found.links = found.links[: error.index - found.attached]
                continue
            self.memory.publish(seq)  # other texts of the same beginning are admitted in the same step
            seconds, count = perf_counter() - began, len(found)
            disk.found, disk.seconds = disk.found + count, disk.seconds + seconds
            if seq.request.cached_tokens is None:
                seq.request.disk_tokens, seq.request.disk_seconds = count * size, seconds
            return True
        return False

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
