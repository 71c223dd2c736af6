"""What a request chose of the cache and the depth, opened: one object for each different choice, shared by its requests.

Nothing here knows a method's name. Lanes, formats and borders of a sequence follow from what its parts say of themselves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from redraft import registry
from redraft.card import Card, Guarantee
from redraft.config import SamplingParams
from redraft.core.plan import StepResult
from redraft.core.sequence import NEVER, Lanes, Sequence
from redraft.core.view import Watch, Window
from redraft.depth.depth import OpenDepth
from redraft.errors import Unsupported
from redraft.kv.codec.codec import OpenCodec
from redraft.kv.keep.keep import OpenKeep
from redraft.kv.read.read import OpenRead
from redraft.models.runner import Runner
from redraft.ops.format import Format, plain

SEAMS = ("keep", "codec", "read", "depth")
MOST = 64  # choices that are kept opened; the one unused longest goes
FORMATS = 256  # of stored pages, which stay as long as the pool


def guarantee(params: SamplingParams, reuse: str = "") -> Guarantee:
    """The weakest of what a request chose."""
    chosen = [(seam, text) for seam in SEAMS if (text := getattr(params, seam))] + ([("reuse", reuse)] if reuse else [])
    cards: list[Card] = [cast(Any, registry.method(seam, registry.parse(text)[0])).card for seam, text in chosen]
    return max((card.guarantee for card in cards), default=Guarantee.SAME_TEXT)


@dataclass(frozen=True, eq=False)
class Chosen:
    """The opened parts, None where nothing was chosen, and what follows for the lanes of a sequence."""

    keep: OpenKeep | None
    codec: OpenCodec | None
    read: OpenRead | None
    depth: OpenDepth | None
    lanes: Lanes
    format: str
    block: str
    layers: frozenset[int] | None

    @property
    def window(self) -> Window | None:
        return None if self.keep is None else self.keep.window


class Policies:
    """The dispatcher of an engine."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._opened: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._chosen: OrderedDict[tuple[str | None, ...], Chosen | None] = OrderedDict()
        self._formats: set[str] = set()
        self._sources = 0

    def check(self, params: SamplingParams, reuse: str = "") -> Chosen | None:
        """What these parameters choose. UnknownMethod, InvalidInput or Unsupported, one line each."""
        texts = tuple(getattr(params, seam) for seam in SEAMS)
        if texts not in self._chosen:
            parts = [None if text is None else self._open(seam, text) for seam, text in zip(SEAMS, texts, strict=True)]
            try:
                self._chosen[texts] = self._choose(*parts) if any(parts) else None
            except Unsupported as error:
                asked = ", ".join(f"{seam}={text}" for seam, text in zip(SEAMS, texts, strict=True) if text)
                raise Unsupported(f"{asked}: {error}") from None
        chosen: Chosen | None = _latest(self._chosen, texts)
        if reuse:
            self._open("reuse", reuse)
            if any(group.kind != "pages" for group in self.runner.spec.memories()):
                raise Unsupported(f"reuse {reuse} takes over keys and values only, and this model has layers with a state of another kind")
            if params.prompt_logprobs is not None:
                raise Unsupported(f"reuse {reuse}: prompt_logprobs need the whole prompt computed, which is what it avoids")
            if chosen is not None and (chosen.keep or chosen.lanes is not Lanes.SHARED):
                raise Unsupported(f"reuse {reuse} takes over plain pages, which keep, codec and read with data of their own do not have")
        return chosen

    def _open(self, seam: str, text: str) -> Any:
        if (seam, text) not in self._opened:
            self._opened[seam, text] = registry.create(seam, text).open(self.runner)
        return _latest(self._opened, (seam, text))

    def _choose(self, keep: OpenKeep | None, codec: OpenCodec | None, read: OpenRead | None, depth: OpenDepth | None) -> Chosen:
        spec, backend = self.runner.spec, self.runner.backend
        if keep is not None and codec is not None and codec.block:
            raise Unsupported("this codec encodes whole blocks, from which no keep policy can evict; choose one of the two")
        if keep is not None and keep.endless and spec.learned_positions is not None:
            raise Unsupported(
                f"{spec.family} has {spec.learned_positions} learned positions: keys cannot be numbered by their place in the cache"
            )
        exact, sides = plain(backend.dtype, spec.head_dim), {}
        if read is not None:
            sides = dict(read.arrays(spec.head_dim, backend.dtype))
        suffix, of = (f"+{read.name}", (read,)) if read is not None and sides else ("", ())
        form = block = ""
        if codec is not None and not codec.block:
            form = self._define(Format(codec.name + suffix, {**codec.arrays, **sides}, codec, of))
        else:
            if suffix:
                form = self._define(Format(suffix, {**exact, **sides}, None, of))
            if codec is not None:
                block = self._define(Format(codec.name + suffix, {**codec.arrays, **sides}, codec, of))
        lanes = Lanes.PER_HEAD if form or block else Lanes.SHARED if keep is None else keep.lanes
        count = len(spec.layers)
        layers = None if depth is None or len(kept := depth.layers(count)) == count else kept
        return Chosen(keep, codec, read, depth, lanes, form, block, layers)

    def _define(self, fmt: Format) -> str:
        if fmt.name not in self._formats and len(self._formats) == FORMATS:
            raise Unsupported(f"pages are stored in {FORMATS} formats already, and no more of them are made; choose options in use")
        self.runner.memory.paged.define(fmt)
        self._formats.add(fmt.name)
        return fmt.name

    # ---- one sequence

    def endless(self, params: SamplingParams) -> bool:
        """Whether positions may pass the trained context: where distances within the cache never do."""
        if params.keep is None:
            return False
        chosen = self.check(params)
        if chosen is None or chosen.keep is None or not chosen.keep.endless:
            return False
        return chosen.window is not None and sum(chosen.window) <= self.runner.spec.context

    def fit(self, seq: Sequence) -> None:
        """Gives a new sequence the form that its request chose."""
        if (chosen := self.check(seq.params)) is None:
            return
        seq.policies, seq.lanes, seq.format, seq.block, seq.layers = chosen, chosen.lanes, chosen.format, chosen.block, chosen.layers
        if chosen.codec is not None and chosen.codec.block:
            seq.encoded = chosen.codec.block
        if chosen.keep is not None:
            seq.most, seq.pure = chosen.keep.most, chosen.keep.pure
        if chosen.layers is not None or chosen.read is not None:
            seq.pure = min(seq.pure, seq.context)

    def begin(self, seq: Sequence) -> None:
        if seq.policies is not None and (keep := seq.policies.keep) is not None:
            seq.state[keep] = keep.begin(seq)

    def fork(self, seq: Sequence, child: Sequence) -> None:
        child.sought = True  # it has what its sibling took over
        if seq.policies is not None and (keep := seq.policies.keep) is not None:
            child.state[keep] = keep.fork(seq.state[keep], child)

    def end(self, seq: Sequence) -> None:
        self._release(seq)
        seq.sought = False
        if seq.policies is not None and seq.policies.keep in seq.state:
            seq.policies.keep.end(seq.state.pop(seq.policies.keep))

    def take_over(self, seq: Sequence, spare: int) -> None:
        """Attaches what is due of the text that this one was made from. Its cached pages are held meanwhile, as long as `spare`
        slabs are left for texts in progress; without them the text is computed."""
        if not seq.sought:
            seq.sought = True
            if seq.index == 0:
                seq.request.reused_tokens = 0
            self._find(seq, spare)
        elif spare < 0:
            self._release(seq)
        while seq.spans and seq.spans[0].at == seq.stored and seq.source is not None:
            span = seq.spans.pop(0)
            self.runner.memory.paged.splice(seq, seq.source, span.first, span.length, span.exact)
            seq.request.reused_tokens += span.length
        if not seq.spans:
            self._release(seq)

    def _find(self, seq: Sequence, spare: int) -> None:
        memory, request = self.runner.memory, seq.request
        old = [*request.before, 0]  # a match leaves one token to run; nothing of the old text runs
        count = memory.match(old, request.salt)
        found = self._open("reuse", request.reuse).spans(old[:count], request.prompt, seq.stored)
        spans = [span for span in found if span.at >= seq.stored]
        if spans and memory.idle_matched(old, request.salt) <= spare:
            self._sources -= 1
            seq.source, seq.spans = Sequence(self._sources, request, 0, old, len(old), 0, 0), spans
            memory.open(seq.source)
            memory.attach(seq.source, count)

    def _release(self, seq: Sequence) -> None:
        if seq.source is not None:
            self.runner.memory.free(seq.source)
        seq.source, seq.spans = None, []

    def border(self, seq: Sequence) -> int:
        """The next value of seq.stored at which a policy has something to do."""
        stored: int = seq.stored
        chosen: Chosen | None = seq.policies
        found: list[int] = [NEVER, *(span.at for span in seq.spans[:1])]
        if seq.request.reuse and not seq.sought:
            return stored
        if chosen is None:
            return min(found)
        if chosen.keep is not None:
            found.append(chosen.keep.border(seq))
        if chosen.block:
            found.append((stored // seq.encoded + 1) * seq.encoded)
        if (chosen.read is not None or chosen.layers is not None) and stored < seq.context:
            found.append(seq.context)
        if chosen.read is not None and chosen.read.grid and stored >= seq.context:
            found.append((stored // chosen.read.grid + 1) * chosen.read.grid)
        return min(found)

    # ---- one step

    def watch(self, seqs: Iterable[Sequence]) -> dict[int, tuple[Watch, ...]]:
        found = {}
        for s, seq in enumerate(seqs):
            if seq.policies is not None and seq.policies.keep is not None and (watch := seq.policies.keep.watch(seq)):
                found[s] = watch
        return found

    def observe(self, result: StepResult, blamed: list[tuple[Sequence, Exception]]) -> None:
        """Whoever's part raises is blamed; the others' hear of the step all the same."""
        for s, (work, accepted) in enumerate(zip(result.work, result.accepted, strict=True)):
            if work.seq.policies is not None and (keep := work.seq.policies.keep) is not None:
                try:
                    keep.observe(work.seq, result.out.attention.get(s), work.rows, accepted.path)
                except Exception as error:
                    blamed.append((work.seq, error))

    def cross(self, seq: Sequence) -> None:
        """After a commit: pages are encoded, evicted from and summarised."""
        chosen: Chosen | None = seq.policies
        if chosen is None:
            return
        paged = self.runner.memory.paged
        if chosen.keep is not None and (kept := chosen.keep.decide(seq, lambda: paged.table.positions(seq))) is not None:
            paged.keep(seq, kept)
        if chosen.read is not None and chosen.read.grid:
            paged.fold(seq, chosen.read)
        if chosen.block and seq.stored and seq.stored % seq.encoded == 0:
            paged.encode(seq)


def _latest(found: OrderedDict[Any, Any], name: Any) -> Any:
    """What `name` stands for, which is now the one used last; of more than MOST the first goes."""
    found.move_to_end(name)
    while len(found) > MOST:
        found.popitem(last=False)
    return found[name]
