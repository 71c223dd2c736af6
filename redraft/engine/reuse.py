"""The reuse of other texts' cache: finds the spans of a new text, attaches them once they are due, and lets rows run again."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial

import numpy as np

from redraft.core.layers import Layers
from redraft.core.plan import Work
from redraft.core.sequence import Rerun, Sequence
from redraft.engine.holds import held
from redraft.kv.reuse.reuse import Later, OpenReuse, Reusing, Spliced, Taken
from redraft.models.runner import Runner
from redraft.ops.arrays import array
from redraft.ops.backend import WeightSums


class CacheReuse:
    """Calls the reuse methods of texts."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def take_over(self, seq: Sequence, spare: int) -> None:
        """Attaches the spans that are due at this position, and begins the repair after the last one. Holds pages of sources while `spare`
        is not negative, that is, while running texts have enough blocks. Otherwise the text is computed."""
        request, paged, reuse = seq.request, self.runner.memory.paged, seq.cache.reuse
        assert reuse is not None, f"sequence {seq.id}: its request has no reuse method"
        if (reusing := seq.reusing) is None:
            if seq.index == 0:
                request.reused_tokens, request.repaired_tokens, request.repair_rows = 0, 0, 0.0
            reusing = seq.reusing = Reusing(self._found(seq, reuse, spare), found=seq.stored)
        elif spare < 0:
            self.release(seq)
        while reusing.spans and (due := reusing.spans[0]).span.at == seq.stored:
            span = due.span
            paged.splice(seq, due.source, span.first, span.length, span.exact)
            request.reused_tokens += span.length
            reusing.attached.append(span)
            del reusing.spans[0]
            if all(taken.source is not due.source for taken in reusing.spans):
                self.runner.memory.free(due.source)
        if not reusing.spans and not reusing.begun:
            first = next((span.at for span in reusing.attached if not span.exact), seq.stored)
            rows, reusing.begun = np.arange(first, seq.stored, dtype=np.int32), True
            read, layers = partial(paged.layer, seq, rows), len(self.runner.spec.layers)
            reusing.repair = reuse.repair(Spliced(rows, layers, read, request, tuple(reusing.attached), reusing.found))
            self._go_on(seq, reusing)
        elif reusing.until == seq.stored:
            self._go_on(seq, reusing)

    def ran(self, work: Work, path: Seq[int], seen: WeightSums | None) -> None:
        """After a step. path: the accepted nodes; seen: statistics of the attention of its rows, if the repair of the text watches them."""
        seq, rerun, reusing = work.seq, work.rerun, work.seq.reusing
        if reusing is None or reusing.repair is None:
            return
        if seen is not None:
            chain = array(seen.chain)[..., : reusing.slots]
            nodes = array(seen.nodes)[:, list(path), ..., : reusing.slots]
            reusing.seen.append(np.concatenate([chain, nodes], 1) if path else chain.copy())
        if rerun is not None:
            assert seq.rerun is not None, f"sequence {seq.id}: rows ran again, but none should"
            if seq.index == 0:
                seq.request.repair_rows += len(rerun.slots) * rerun.share
                seq.request.repaired_tokens += len(rerun.slots) if rerun.layers is None else 0
            seq.rerun = seq.rerun.after(len(rerun.slots))
            if seq.rerun is None:
                self._go_on(seq, reusing)

    def release(self, seq: Sequence) -> None:
        """Frees the sources of spans that are not attached yet."""
        if seq.reusing is not None:
            for source in {taken.source for taken in seq.reusing.spans}:
                self.runner.memory.free(source)
            seq.reusing.spans = []

    def _go_on(self, seq: Sequence, reusing: Reusing) -> None:
        """Tells the repair what was seen, and does what it asks for next."""
        layers = len(self.runner.spec.layers)
        while reusing.repair is not None:
            seen = np.concatenate(reusing.seen, 1) if reusing.seen else None
            reusing.watch, reusing.seen, reusing.until = (), [], None
            try:
                found = reusing.repair.send(seen)
            except StopIteration:
                reusing.repair = None
                return
            assert all(watch.each for watch in found.watch), "sums over rows depend on how these are cut into steps"
            reusing.watch, reusing.slots = found.watch, seq.stored
            if isinstance(found, Later):
                if found.at > seq.stored:
                    reusing.until = found.at
                    return
            elif len(found.rows):
                whole, count = found.layers is None or found.layers >= layers, found.layers or 0
                seq.rerun = Rerun(found.rows, None if whole else Layers.whole(range(count)), 1.0 if whole else count / layers)
                return

    def _found(self, seq: Sequence, reuse: OpenReuse, spare: int) -> list[Taken]:
        """The spans of a new text, as far as they are in the cache, with their sources held. A text that starts again, or a further text of
        the request, has those of the first time."""
        memory, request = self.runner.memory, seq.request

        def cached(tokens: Seq[int]) -> int:
            return memory.match([*tokens, 0], request.salt)  # a match always leaves one token to run, so one is added

        if request.spans is None:
            request.spans = reuse.spans(request, seq.stored, cached)
        taken: list[Taken] = []
        sources: dict[int, Sequence] = {}
        at = seq.stored
        for span in request.spans:
            skipped = max(0, at - span.at)
            length = min(span.length, cached(span.source) - span.first) - skipped
            if length <= 0:
                continue
            if id(span.source) not in sources:
                wanted = memory.idle_matched([*span.source, 0], request.salt)
                if wanted > spare:
                    continue
                spare -= wanted
                sources[id(span.source)] = held(memory, request, span.source)
            taken.append(Taken(span._replace(at=span.at + skipped, first=span.first + skipped, length=length), sources[id(span.source)]))
            at = span.at + skipped + length
        return taken
