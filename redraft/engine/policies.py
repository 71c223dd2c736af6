"""The cache and layer methods of a request, opened, as a `CachePlan`.

This file names no method. The lanes, formats and sync points of a sequence follow from attributes of its methods.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.plan import StepResult
from redraft.core.sequence import NEVER, PLAIN, UNLIMITED, CachePlan, Lanes, Sequence
from redraft.core.taps import NO_TAPS, Taps
from redraft.engine.faults import SafeCalls
from redraft.engine.opened import Opened
from redraft.errors import Unsupported
from redraft.kv.eviction.eviction import OpenEviction
from redraft.kv.quantization.quantization import OpenCodec
from redraft.kv.reuse.reuse import OpenReuse
from redraft.kv.sparse_attention.sparse_attention import OpenSparseAttention
from redraft.layer_skipping.layer_skipping import OpenLayerSkipping
from redraft.models.runner import Runner
from redraft.ops.backend import Feature
from redraft.ops.format import Format, plain
from redraft.steer.steer import OpenSteer

SEAMS = ("keep", "codec", "read", "depth")
CHOICES = (*SEAMS, "steer")
FORMATS = 256  # page formats that may be defined; they stay as long as the pool


class Policies:
    """Opens the cache methods of requests and calls them for their sequences."""

    def __init__(self, runner: Runner, opened: Opened) -> None:
        self.runner, self.opened = runner, opened
        self._formats: set[str] = set()
        self._sources = 0

    def check(self, params: SamplingParams, reuse: str = "") -> CachePlan:
        """The plan that these parameters choose. Raises UnknownMethod, InvalidInput or Unsupported, one line each."""
        texts = {seam: text for seam in CHOICES if (text := getattr(params, seam)) is not None}
        parts = {seam: self._open(seam, text) for seam, text in {**texts, **({"reuse": reuse} if reuse else {})}.items()}
        try:
            plan = self._plan(**parts) if parts else PLAIN
        except Unsupported as error:
            chosen = ", ".join(f"{seam}={text}" for seam, text in texts.items())
            raise Unsupported(f"{chosen}: {error}") from None
        if reuse and any(group.kind != "pages" for group in self.runner.spec.memories()):
            raise Unsupported(f"reuse {reuse} takes over keys and values only, but this model has layers with another kind of memory")
        if reuse and (plan.keep or plan.lanes is not Lanes.SHARED):
            raise Unsupported(f"reuse {reuse} takes over plain pages; keep, codec and a read with data of its own store other pages")
        if reuse and plan.depth is not None and plan.depth.taps is not NO_TAPS:
            raise Unsupported(f"depth={params.depth} reads every row of the context, but reuse {reuse} skips parts of it")
        return plan

    def _open(self, seam: str, text: str) -> Any:
        method = registry.create(seam, text)
        return self.opened.get(f"{seam} = {text}", (seam, method), lambda: method.open(self.runner))

    def _plan(
        self,
        keep: OpenEviction | None = None,
        codec: OpenCodec | None = None,
        read: OpenSparseAttention | None = None,
        depth: OpenLayerSkipping | None = None,
        steer: OpenSteer | None = None,
        reuse: OpenReuse | None = None,
    ) -> CachePlan:
        spec = self.runner.spec
        if keep is not None and codec is not None and codec.block:
            raise Unsupported("this codec encodes whole pages, and a keep policy cannot evict from encoded pages; choose one of the two")
        if keep is not None and keep.endless and spec.learned_positions is not None:
            raise Unsupported(
                f"{spec.family} has {spec.learned_positions} learned positions, so keys cannot be renumbered by their place in the cache"
            )
        if read is not None and read.own and codec is not None and codec.block:
            raise Unsupported("this codec encodes whole pages, and the sparse read needs the keys of its text as they were stored")
        if keep is not None and keep.merges and read is not None:
            sides = read.arrays(spec.head_dim, self.runner.backend.dtype)
            if not all(array.whole for array in sides.values()):
                raise Unsupported(
                    "this policy merges slots, but the sparse read stores data of its own with each slot; choose one of the two"
                )
        form, encoded = self._stored(codec, read)
        policies = keep or codec or read or depth or steer
        plain_bits = not policies or Feature.BIT_EXACT in self.runner.backend.features  # as a plain request computes them
        window = None if keep is None else keep.window
        return CachePlan(
            keep,
            read,
            reuse,
            lanes=Lanes.PER_HEAD if form or encoded else Lanes.SHARED if keep is None else keep.lanes,
            format=form,
            encoded=encoded,
            encode_every=codec.block if codec is not None and codec.block else UNLIMITED,
            window=window,
            shareable=plain_bits,
            endless=keep is not None and keep.endless and window is not None and window.size <= spec.context,
            depth=depth if depth is not None and depth.skips else None,
            steer=steer,
        )

    def _stored(self, codec: OpenCodec | None, read: OpenSparseAttention | None) -> tuple[str, str]:
        """The format in which pages are written, and the format to which full pages are converted. Empty: none of its own."""
        spec, backend = self.runner.spec, self.runner.backend
        exact, sides = plain(backend.dtype, spec.head_dim), {}
        if read is not None:
            sides = dict(read.arrays(spec.head_dim, backend.dtype))
        suffix, of = (f"+{read.name}", (read,)) if read is not None and sides else ("", ())
        if codec is not None and not codec.block:
            return self._define(Format(codec.name + suffix, {**codec.arrays, **sides}, codec, of)), ""
        form = self._define(Format(suffix, {**exact, **sides}, None, of)) if suffix else ""
        return form, "" if codec is None else self._define(Format(codec.name + suffix, {**codec.arrays, **sides}, codec, of))

    def _define(self, fmt: Format) -> str:
        if fmt.name in self._formats:
            return fmt.name
        if len(self._formats) == FORMATS:
            raise Unsupported(f"{FORMATS} page formats are in use, which is the limit; choose options that are in use already")
        self.runner.memory.paged.define(fmt)
        self._formats.add(fmt.name)
        return fmt.name

    # ---- one sequence

    def fit(self, seq: Sequence) -> None:
        """Gives a new sequence the plan that its request chose."""
        seq.cache = plan = self.check(seq.params, seq.request.reuse)
        seq.onset = NEVER if plan.keep is None else plan.keep.onset(seq.context)
        seq.shareable_tokens = seq.onset.shareable if plan.shareable else 0
        if plan.depth is not None or plan.read is not None:
            seq.shareable_tokens = min(seq.shareable_tokens, seq.context)
        if plan.steer is not None:
            seq.between = plan.steer.between(seq.context)
            seq.shareable_tokens = min(seq.shareable_tokens, plan.steer.shareable_tokens(seq.context))
        if plan.depth is not None and plan.depth.taps is not NO_TAPS:
            seq.shareable_tokens = 0

    def parts(self, seq: Sequence) -> tuple[Any, ...]:
        return seq.cache.keep, seq.cache.read, seq.cache.reuse, seq.cache.depth, seq.cache.steer

    def begin(self, seq: Sequence) -> None:
        for policy in self._kept(seq):
            seq.state[policy] = policy.begin(seq)
        self._cross(seq)  # pages that the text found or that arrived may end behind a border
        self._read_border(seq, False)

    def fork(self, seq: Sequence, child: Sequence) -> None:
        child.reuse_searched = True  # its sibling already took over what there was
        for policy in self._kept(seq):
            child.state[policy] = policy.fork(seq.state[policy], child)
        child.layers = seq.layers

    def end(self, seq: Sequence) -> None:
        self._release(seq)
        seq.reuse_searched, seq.layers = False, None
        for policy in self._kept(seq):
            if policy in seq.state:
                policy.end(seq.state.pop(policy))

    @staticmethod
    def _kept(seq: Sequence) -> list[Any]:
        """The policies that keep a state of the sequence."""
        return [policy for policy in (seq.cache.keep, seq.cache.read, seq.cache.depth) if policy is not None]

    @staticmethod
    def _cross(seq: Sequence) -> None:
        """Sets the layers that the next rows run."""
        if (depth := seq.cache.depth) is None or seq.stored < seq.context:
            return
        chosen = depth.plan(seq)
        assert chosen.within(seq.layers) == chosen, f"sequence {seq.id} at {seq.stored}: rows run a layer that rows before them skipped"
        seq.layers = chosen

    def _read_border(self, seq: Sequence, edited: bool) -> None:
        """Brings the state with which the next rows select up to date."""
        read = seq.cache.read
        if read is not None and read.own and seq.stored >= seq.context:
            read.border(seq.state[read], seq, self.runner.memory.paged.held(seq), edited)

    def take_over(self, seq: Sequence, spare: int) -> None:
        """Takes over the parts of the source text that are due at this position. Holds the source's pages while `spare` is not
        negative, that is, while running texts have enough blocks. Otherwise the text is computed."""
        if not seq.reuse_searched:
            seq.reuse_searched = True
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
        memory, request, reuse = self.runner.memory, seq.request, seq.cache.reuse
        assert reuse is not None, f"sequence {seq.id}: its request has no reuse method"
        old = [*request.before, 0]  # a match always leaves one token to run, so one is added
        count = memory.match(old, request.salt)
        spans = [span for span in reuse.spans(old[:count], request.prompt, seq.stored) if span.at >= seq.stored]
        if spans and memory.idle_matched(old, request.salt) <= spare:
            self._sources -= 1
            seq.source, seq.spans = Sequence(self._sources, request, 0, old, len(old), 0, 0), spans
            memory.open(seq.source)
            memory.attach(seq.source, count)

    def _release(self, seq: Sequence) -> None:
        if seq.source is not None:
            self.runner.memory.free(seq.source)
        seq.source, seq.spans = None, []

    def sync_point(self, seq: Sequence) -> int:
        """The next value of seq.stored at which a policy must be called."""
        stored, plan = seq.stored, seq.cache
        if plan is PLAIN and not seq.spans:
            return UNLIMITED
        if plan.reuse is not None and not seq.reuse_searched:
            return stored
        found: list[int] = [UNLIMITED, *(span.at for span in seq.spans[:1])]
        if plan.keep is not None:
            found.append(plan.keep.sync_point(seq))
        if plan.encoded:
            found.append((stored // plan.encode_every + 1) * plan.encode_every)
        if (plan.read is not None or plan.depth is not None) and stored < seq.context:
            found.append(seq.context)
        elif plan.depth is not None:
            found.append(plan.depth.border(seq))
        if plan.read is not None and plan.read.sync_every and stored >= seq.context:
            found.append((stored // plan.read.sync_every + 1) * plan.read.sync_every)
        return min(found)

    # ---- one step

    def taps(self, seqs: Iterable[Sequence]) -> Taps:
        found, watched = NO_TAPS, {}
        for s, seq in enumerate(seqs):
            keep, depth = seq.cache.keep, seq.cache.depth
            if keep is not None and (watch := keep.watch(seq)):
                watched[s] = watch
            if depth is not None and seq.stored < seq.context:
                found |= depth.taps
        return found | Taps(attention=watched) if watched else found

    def observe(self, result: StepResult, safe: SafeCalls) -> None:
        for s, (work, accepted) in enumerate(zip(result.work, result.accepted, strict=True)):
            seq, (keep, depth) = work.seq, (work.seq.cache.keep, work.seq.cache.depth)
            if keep is not None:
                safe.call(seq, keep.observe, seq, result.out.attention.get(s), work.rows, accepted.path)
            if depth is not None and depth.taps is not NO_TAPS and seq.stored <= seq.context:
                first = int(result.batch.starts[s])
                rows = {layer: h[first : first + work.rows] for layer, h in result.out.hidden.items() if layer in depth.taps.hidden}
                safe.call(seq, depth.observe, seq, rows)

    def sync(self, seq: Sequence) -> None:
        """After a commit: sets the layers of the next rows, evicts tokens, summarizes pages and encodes pages, as the plan says."""
        plan, paged = seq.cache, self.runner.memory.paged
        self._cross(seq)
        kept = None if plan.keep is None else plan.keep.decide(seq, paged.held(seq))
        if kept is not None:
            paged.keep(seq, kept)
        if plan.read is not None and plan.read.sync_every and plan.format:
            paged.summarize(seq, plan.read)
        self._read_border(seq, kept is not None)
        if plan.encoded and seq.stored and seq.stored % plan.encode_every == 0:
            paged.encode(seq)
