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
from redraft.core.view import Parallel
from redraft.engine.faults import SafeCalls
from redraft.engine.opened import Opened
from redraft.engine.reuse import CacheReuse
from redraft.errors import Unsupported
from redraft.kv.eviction.eviction import OpenEviction
from redraft.kv.quantization.quantization import OpenCodec
from redraft.kv.reuse.reuse import OpenReuse, Reusing
from redraft.kv.sparse_attention.sparse_attention import OpenSparseAttention
from redraft.layer_skipping.layer_skipping import OpenLayerSkipping
from redraft.models.runner import Runner
from redraft.ops.backend import Feature
from redraft.ops.format import Format, plain
from redraft.steer.steer import OpenSteer

SEAMS = ("keep", "codec", "read", "depth")
CHOICES = (*SEAMS, "steer")
FORMATS = 256  # page formats that options may define; they stay as long as the pool. Those of methods without options do not count


class Policies:
    """Opens the cache methods of requests and calls them for their sequences."""

    def __init__(self, runner: Runner, opened: Opened) -> None:
        self.runner, self.opened = runner, opened
        self.reuse = CacheReuse(runner)
        self._formats: set[str] = set()

    def check(self, params: SamplingParams, reuse: str = "") -> CachePlan:
        """The plan that these parameters choose. Raises UnknownMethod, InvalidInput or Unsupported, one line each."""
        texts = {seam: text for seam in CHOICES if (text := getattr(params, seam)) is not None}
        parts = {seam: self._open(seam, text) for seam, text in {**texts, **({"reuse": reuse} if reuse else {})}.items()}
        try:
            limit = FORMATS if any(":" in texts.get(seam, "") for seam in ("codec", "read")) else None
            plan = self._plan(limit, **parts) if parts else PLAIN
        except Unsupported as error:
            chosen = ", ".join(f"{seam}={text}" for seam, text in texts.items())
            raise Unsupported(f"{chosen}: {error}") from None
        if reuse and any(group.kind != "pages" for group in self.runner.spec.memories()):
            raise Unsupported(f"reuse {reuse} takes over keys and values only, but this model has layers with another kind of memory")
        if reuse and (plan.keep or plan.lanes is not Lanes.SHARED):
            raise Unsupported(f"reuse {reuse} takes over plain pages; keep, codec and a read with data of its own store other pages")
        if reuse and plan.read is not None and (plan.read.watches or plan.read.far is not None or plan.read.inside < UNLIMITED):
            raise Unsupported(f"reuse {reuse}: read={params.read} acts on rows of the prompt, but reuse skips parts of it")
        if reuse and plan.depth is not None and plan.depth.taps is not NO_TAPS:
            raise Unsupported(f"depth={params.depth} reads every row of the context, but reuse {reuse} skips parts of it")
        return plan

    def _open(self, seam: str, text: str) -> Any:
        method = registry.create(seam, text)
        return self.opened.get(f"{seam} = {text}", (seam, method), lambda: method.open(self.runner))

    def _plan(
        self,
        limit: int | None,
        keep: OpenEviction | None = None,
        codec: OpenCodec | None = None,
        read: OpenSparseAttention | None = None,
        depth: OpenLayerSkipping | None = None,
        steer: OpenSteer | None = None,
        reuse: OpenReuse | None = None,
    ) -> CachePlan:
        spec = self.runner.spec
        if codec is not None and codec.block:
            self._check_pages(codec, keep, read)
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
        if read is not None:
            self._check_read(keep, read)
        form, encoded = self._stored(codec, read, limit)
        policies = keep or codec or read or depth or steer
        plain_bits = not policies or Feature.BIT_EXACT in self.runner.backend.features  # as a plain request computes them
        window, far = None if keep is None else keep.window, None if read is None else read.far
        most = window.size if window is not None and keep is not None and keep.endless else None if far is None else max(far)
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
            endless=most is not None and most <= spec.context,
            depth=depth if depth is not None and depth.skips else None,
            steer=steer,
        )

    @staticmethod
    def _check_pages(codec: OpenCodec, keep: OpenEviction | None, read: OpenSparseAttention | None) -> None:
        """Unsupported if these methods cannot be combined with a codec of whole pages."""
        demotes = codec.block == UNLIMITED
        if keep is None:
            if demotes:
                raise Unsupported("this codec encodes what a keep policy would evict; choose a keep policy too")
            return
        if keep.merges:
            raise Unsupported("this keep policy writes slots that it keeps, and the codec encodes whole pages; choose one of the two")
        if keep.window is not None and demotes:
            raise Unsupported("this keep policy hides what it evicts from rows, so the codec would encode what no row reads; choose one")
        if not keep.once and not demotes:
            raise Unsupported(
                "this keep policy evicts more than once, and a keep policy cannot evict from encoded pages; choose one of the two"
            )
        if read is not None and demotes:
            raise Unsupported(
                "this codec encodes slots from many pages, and a sparse read knows the pages of the text; choose one of the two"
            )

    def _check_read(self, keep: OpenEviction | None, read: OpenSparseAttention) -> None:
        spec = self.runner.spec
        if read.far is not None and spec.learned_positions is not None:
            raise Unsupported(f"{spec.family} has learned positions, so keys cannot be scored at another distance than their own")
        if read.far is not None and keep is not None and keep.window is not None and keep.window.turned:
            raise Unsupported("the keep policy and the sparse read both choose the distance of the first keys; choose one of the two")
        if read.watches and keep is not None:
            raise Unsupported("the sparse read watches all slots of its text, and a keep policy removes some; choose one of the two")

    def _stored(self, codec: OpenCodec | None, read: OpenSparseAttention | None, limit: int | None) -> tuple[str, str]:
        """The format in which pages are written, and the format to which full pages are converted. Empty: none of its own. limit: of the
        number of formats."""
        spec, backend = self.runner.spec, self.runner.backend
        exact, sides = plain(backend.dtype, spec.head_dim), {}
        if read is not None:
            sides = dict(read.arrays(spec.head_dim, backend.dtype))
        suffix, of = (f"+{read.name}", (read,)) if read is not None and sides else ("", ())
        if codec is not None and not codec.block:
            return self._define(Format(codec.name + suffix, {**codec.arrays, **sides}, codec, of), limit), ""
        form = self._define(Format(suffix, {**exact, **sides}, None, of), limit) if suffix else ""
        return form, "" if codec is None else self._define(Format(codec.name + suffix, {**codec.arrays, **sides}, codec, of), limit)

    def _define(self, fmt: Format, limit: int | None) -> str:
        if fmt.name in self._formats:
            return fmt.name
        if limit is not None and len(self._formats) >= limit:
            raise Unsupported(
                f"{limit} page formats are in use, which is the limit; choose options that are in use already, or the defaults"
            )
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
            seq.shareable_tokens = min(seq.shareable_tokens, seq.context, *self._starts(seq))
        if plan.steer is not None:
            seq.between = plan.steer.between(seq.context)
            seq.shareable_tokens = min(seq.shareable_tokens, plan.steer.shareable_tokens(seq.context))
        if plan.depth is not None and plan.depth.taps is not NO_TAPS:
            seq.shareable_tokens = 0
        if plan.reuse is not None and plan.reuse.parallel is not None and (chunks := seq.request.chunks):
            seq.parallel = Parallel(tuple(chunks), *plan.reuse.parallel)
            seq.shareable_tokens = min(seq.shareable_tokens, chunks[0][1])  # later chunks do not see those before them

    def parts(self, seq: Sequence) -> tuple[Any, ...]:
        return seq.cache.keep, seq.cache.read, seq.cache.reuse, seq.cache.depth, seq.cache.steer

    def begin(self, seq: Sequence) -> None:
        for policy in self._kept(seq):
            seq.state[policy] = policy.begin(seq)
        self._cross(seq)  # pages that the text found or that arrived may end behind a border
        self._read_border(seq, False)

    def fork(self, seq: Sequence, child: Sequence) -> None:
        child.reusing = Reusing(begun=True)  # its sibling already took over what there was
        for policy in self._kept(seq):
            child.state[policy] = policy.fork(seq.state[policy], child)
        child.layers = seq.layers

    def end(self, seq: Sequence) -> None:
        self.reuse.release(seq)
        seq.reusing = seq.rerun = seq.layers = None
        for policy in self._kept(seq):
            if policy in seq.state:
                policy.end(seq.state.pop(policy))

    @staticmethod
    def _kept(seq: Sequence) -> list[Any]:
        """The policies that keep a state of the sequence."""
        return [policy for policy in (seq.cache.keep, seq.cache.read, seq.cache.depth) if policy is not None]

    @staticmethod
    def _starts(seq: Sequence) -> list[int]:
        """The positions from which a sparse read selects and changes distances. Rows on the two sides of one are in different steps."""
        if (read := seq.cache.read) is None:
            return []
        return [seq.reads_from, *([] if read.far is None else [read.far.near])]

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
        if read is not None and read.own and seq.stored >= seq.reads_from:
            read.border(seq.state[read], seq, self.runner.memory.paged.held(seq), edited)

    def sync_point(self, seq: Sequence) -> int:
        """The next value of seq.stored at which a policy must be called."""
        stored, plan = seq.stored, seq.cache
        if plan is PLAIN:
            return UNLIMITED
        found: list[int] = [UNLIMITED]
        if plan.reuse is not None:
            if seq.reusing is None:
                return stored
            found += [taken.span.at for taken in seq.reusing.spans[:1]]
            if seq.reusing.until is not None:
                found.append(seq.reusing.until)
            if seq.parallel is not None and stored < seq.parallel.end:
                found.append(seq.parallel.end)
        if plan.keep is not None:
            found.append(plan.keep.sync_point(seq))
        if plan.encoded:
            found.append((stored // plan.encode_every + 1) * plan.encode_every)
        if plan.depth is not None:
            found.append(seq.context if stored < seq.context else plan.depth.border(seq))
        found += [start for start in self._starts(seq) if stored < start]
        if plan.read is not None and plan.read.sync_every and stored >= seq.reads_from:
            found.append((stored // plan.read.sync_every + 1) * plan.read.sync_every)
        return min(found)

    # ---- one step

    def taps(self, seqs: Iterable[Sequence]) -> Taps:
        found, watched = NO_TAPS, {}
        for s, seq in enumerate(seqs):
            keep, read, depth = seq.cache.keep, seq.cache.read, seq.cache.depth
            for policy in (keep, read):  # one of the two at most
                if policy is not None and (watch := policy.watch(seq)):
                    watched[s] = watch
            if seq.reusing is not None and seq.reusing.watch:
                watched[s] = seq.reusing.watch
            if depth is not None and seq.rerun is None and seq.stored < seq.context:
                found |= depth.taps
        return found | Taps(attention=watched) if watched else found

    def observe(self, result: StepResult, safe: SafeCalls) -> None:
        for s, (work, accepted) in enumerate(zip(result.work, result.accepted, strict=True)):
            seq, (keep, read, depth) = work.seq, (work.seq.cache.keep, work.seq.cache.read, work.seq.cache.depth)
            if seq.reusing is not None and seq.cache.reuse is not None:
                safe.call(seq, self.reuse.ran, work, accepted.path, result.out.attention.get(s))
            if work.rerun is not None:
                continue
            for policy in (keep, read):
                if policy is not None:
                    seen = result.out.attention.get(s)
                    if seen is not None and seq.cache.demotes:
                        seen = self.runner.memory.paged.watched(seq, seen)
                    safe.call(seq, policy.observe, seq, seen, work.rows, accepted.path)
            if depth is not None and depth.taps is not NO_TAPS and seq.stored <= seq.context:
                first = int(result.batch.starts[s])
                rows = {layer: h[first : first + work.rows] for layer, h in result.out.hidden.items() if layer in depth.taps.hidden}
                safe.call(seq, depth.observe, seq, rows)

    def sync(self, seq: Sequence) -> None:
        """After a commit: sets the layers of the next rows, evicts tokens, summarizes pages and encodes pages, as the plan says."""
        plan, paged = seq.cache, self.runner.memory.paged
        self._cross(seq)
        kept = None if plan.keep is None else plan.keep.decide(seq, paged.held(seq))
        if kept is not None and plan.demotes:
            paged.demote(seq, kept)
        elif kept is not None:
            paged.keep(seq, kept)
        if plan.read is not None and plan.read.sync_every and plan.format:
            paged.summarize(seq, plan.read)
        self._read_border(seq, kept is not None)
        if plan.encoded and seq.stored and seq.stored % plan.encode_every == 0 and not seq.stored < seq.onset.at < UNLIMITED:
            paged.encode(seq)
