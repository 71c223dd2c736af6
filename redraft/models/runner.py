"""A model that runs: spec, weights, backend and its own memory. Only this file loops over layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from redraft.core.batch import Batch
from redraft.core.layers import Between
from redraft.core.spec import Attention, LayerSpec, ModelSpec
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import F64, I64
from redraft.errors import Unsupported
from redraft.kv.disk.pages import DiskPages
from redraft.kv.memory import Memories
from redraft.kv.paged import Paged
from redraft.kv.table import PageTable
from redraft.models import identity, mixers
from redraft.models.adapter import Adapter, adapted, embedded, headed, own_rows
from redraft.models.layers import attended, fed
from redraft.ops.arrays import Tensor, array, like, name_of, namespace, replaced, times
from redraft.ops.backend import Backend, Feature, ForwardResult, LayerWeights, Room, Weights, WeightSums

if TYPE_CHECKING:
    from redraft.weights.quant import Quantizer


class Runner:
    """Owns the memory of one model's sequences. A draft model is a second Runner with its own memory (see draft_model.py).

    memory: of all layers, None for `blocks` blocks of pages; source: the checkpoint's folder, None for weights from elsewhere;
    draft_model: the default checkpoint of drafters with a draft model; quant: how linear weights are stored, also those of draft
    models; draft_models: the draft models loaded so far, by folder; weight_cache: see `packs.read`, for draft models; room: gives
    the pool its memory.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        backend: Backend,
        blocks: int,
        *,
        sharing: bool = True,
        memory: Paged | Memories | None = None,
        source: Path | None = None,
        draft_model: str | None = None,
        quant: Quantizer | None = None,
        weight_cache: int | None = None,
        room: Room | None = None,
    ) -> None:
        """Raises Unsupported if the engine cannot serve this model on this backend."""
        mixers.check(spec, backend)
        self.spec, self.weights, self.backend = spec, weights, backend
        self.source, self.draft_model, self.quant, self.weight_cache = source, draft_model, quant, weight_cache
        self.draft_models: dict[Path, Runner] = {}
        self.adapters: dict[str, Adapter] = {}  # that requests may choose, by name
        self.disk: DiskPages | None = None  # where published pages are kept, see keep_prefixes
        self.memory = Paged(backend, spec, blocks, sharing=sharing, room=room) if memory is None else memory
        self._cuts = {i for i, (a, b) in enumerate(pairwise((*spec.layers, None))) if not (_attends(a) and _attends(b))}
        self._places = {layer: (part, i) for part in self.memory.members for i, layer in enumerate(part.layers)}

    @property
    def table(self) -> PageTable:
        """The page table of the layers that own pages, to inspect."""
        return self.memory.paged.table

    def keep_prefixes(self, folder: Path, room: int | None = None, model: str = "") -> None:
        """Keeps published pages in a folder, and finds those that earlier processes left there; see kv/disk. model: its name in a list of
        the folder. Unsupported if the model has memory of another kind, InvalidInput if the folder cannot be used."""
        if self.memory.members != (self.memory.paged,):
            raise Unsupported("prefix_cache_dir keeps keys and values only, but this model has layers with another kind of memory")
        quant = "" if self.quant is None else f" {self.quant!r}"
        described = f"{name_of(self.backend.dtype)}{quant}, {self.backend.name}"
        self.disk = DiskPages(self.memory.paged, folder, room, identity.whole_form(self), model, described)
        self.table.listener = self.disk.listed

    @cached_property
    def form(self) -> dict[str, str]:
        """What another engine must have in common with this one to read its cache."""
        return identity.form(self)

    def forward(self, batch: Batch, taps: Taps = NO_TAPS) -> ForwardResult:
        """Embedding, segments of layers, and the head on the wanted rows. Writes keys and values of the rows that run.

        If some sequences skip half a layer, the rows of the others run alone. A skipped half passes hidden states on unchanged.
        """
        if any(adapter is not None and adapter.spec is not self.spec for adapter in batch.adapters):
            # they are of the model that this one drafts for
            batch = replace(batch, adapters=[None] * len(batch.adapters))
        if Feature.RUN in self.backend.features:  # PyTorch does little here, and to enter its mode costs more than the mode saves
            out = self.backend.forward(batch, self.spec, self.weights, self.memory.pool, taps)
            return self._scaled(self._forward(batch, taps) if out is None else out)
        with self.backend.mode():
            return self._scaled(self._forward(batch, taps))

    def _scaled(self, out: ForwardResult) -> ForwardResult:
        """With the logits that sampling uses. Their order is that of the head's outputs."""
        factor, limit, logits = self.spec.logit_scale, self.spec.logit_softcap, out.logits
        if logits is None or (factor == 1.0 and limit is None):
            return out
        logits = times(logits, factor)
        return out._replace(logits=logits if limit is None else self.backend.cap(logits, limit))

    def _forward(self, batch: Batch, taps: Taps) -> ForwardResult:
        backend, spec, weights = self.backend, self.spec, self.weights
        plan, adapters = backend.plan(batch, spec, taps), own_rows(batch)
        h = embedded(backend.embed(weights, plan), batch, adapters)
        if spec.embed_scale != 1.0:
            h = times(h, float(namespace(h).asarray(spec.embed_scale, dtype=h.dtype)))
        if batch.vectors is not None:
            h = self._started(h, batch, *batch.vectors)
        hidden = {}
        parts, acts = _Parts(self, batch, taps, plan, adapters), _acts(batch)
        for first, last in self.segments(taps, acts):
            h = self._acted(h, acts.get(first, ()), batch)
            for (attends, feeds), layers in groupby(range(first, last), parts.at):
                run = list(layers)
                h = self._run(run[0], run[-1] + 1, h, attends) if attends is feeds else self._halves(run, h, attends, feeds)
            if last - 1 in taps.hidden:
                hidden[last - 1] = h
        out = headed(
            backend.head(h, weights, spec.final_norm, plan, taps),
            batch,
            adapters,
            lambda head: backend.head(h, replace(weights, head=head), spec.final_norm, plan, taps),
        )
        if not hidden and not taps.attention:
            return out
        return out._replace(hidden=hidden, attention=parts.watched() if taps.attention else {})

    def _started(self, h: Tensor, batch: Batch, rows: I64, vectors: Any) -> Tensor:
        """With rows that start from vectors instead of their tokens' embeddings."""
        values = like(vectors, h)
        if (positions := self.weights.positions) is not None:
            values = values + positions[batch.positions[rows].astype(np.int64)]
        return replaced(h, rows, values)

    @staticmethod
    def _acted(h: Tensor, texts: Iterable[tuple[int, Between, int]], batch: Batch) -> Tensor:
        for s, between, layer in texts:
            span = np.arange(batch.starts[s], batch.starts[s + 1])
            h = replaced(h, span, between.act(layer, h[span], batch.positions[span]))
        return h

    def _run(self, first: int, last: int, h: Tensor, part: _Part) -> Tensor:
        """Layers of which the sequences of `part` run both halves, and the others none: in one call of the backend if it can."""
        if not part.places:
            return h
        x, spec = h if part.rows is None else h[part.rows], self.spec
        done = None
        if Feature.RUN in self.backend.features and _attends(spec.layers[first]):
            done = self.backend.run(first, last, x, spec, self.weights, self.memory.pool, part.plan)
        if done is None:
            done = x
            for i in range(first, last):
                done = fed(done, self._attended(i, done, part), spec.layers[i], self._weights(i, part), self.backend)
        return done if part.rows is None else replaced(h, part.rows, done)

    def _halves(self, layers: list[int], h: Tensor, attends: _Part, feeds: _Part) -> Tensor:
        """Layers of which the sequences of `attends` run the attention half and those of `feeds` the MLP half."""
        for i in layers:
            after = h
            if attends.places:
                after = (
                    self._attended(i, h, attends)
                    if attends.rows is None
                    else replaced(h, attends.rows, self._attended(i, h[attends.rows], attends))
                )
            if feeds.places:
                whole, rows = feeds.rows is None, feeds.rows
                x, y = (h, after) if whole else (h[rows], after[rows])
                done = fed(x, y, self.spec.layers[i], self._weights(i, feeds), self.backend)
                after = done if whole else replaced(after, rows, done)
            h = after
        return h

    def _attended(self, i: int, h: Tensor, part: _Part) -> Tensor:
        memory, index = self._places[i]
        return attended(h, index, self.spec.layers[i], self._weights(i, part), self.backend, memory.pool, part.plan)

    def _weights(self, i: int, part: _Part) -> LayerWeights:
        return adapted(self.weights.layers[i], i, part.adapters)

    def normed(self, hidden: Tensor) -> F64:
        """f64[T, hidden]: states after the last layer, normed as the head reads them."""
        with self.backend.mode():
            rows = self.backend.norm(hidden, self.weights.final_norm, self.spec.final_norm)
            return array(rows).astype(np.float64)

    def segments(self, taps: Taps, cuts: Iterable[int] = ()) -> Iterator[tuple[int, int]]:
        """(first, last) of runs of layers, one for each backend call. Cuts after every tapped layer, before the layers `cuts`, and around
        layers without attention."""
        first = 0
        for last in sorted(taps.hidden | self._cuts | {layer - 1 for layer in cuts if layer}):
            yield first, last + 1
            first = last + 1


def _attends(layer: LayerSpec | None) -> bool:
    return layer is not None and isinstance(layer.mixer, Attention)


def _acts(batch: Batch) -> dict[int, list[tuple[int, Between, int]]]:
    """Layer -> what acts before it: the sequence, its Between, the layer."""
    found: dict[int, list[tuple[int, Between, int]]] = {}
    for s, between in enumerate(batch.between):
        if between is not None and batch.starts[s] < batch.starts[s + 1]:
            for layer in between.cuts:
                found.setdefault(layer, []).append((s, between, layer))
    return found


class _Part(NamedTuple):
    """Some of a batch's sequences: their indices, their rows (None: all of the batch), their own plan and adapters."""

    places: tuple[int, ...]
    rows: I64 | None
    plan: Any
    adapters: list[tuple[Adapter, I64]]


class _Parts:
    """Which sequences run which halves of a layer, with a plan for each set of sequences that runs alone."""

    def __init__(self, runner: Runner, batch: Batch, taps: Taps, plan: Any, adapters: list[tuple[Adapter, I64]]) -> None:
        self.runner, self.batch, self.taps = runner, batch, taps
        every = tuple(range(len(batch.layers)))
        self.all = _Part(every, None, plan, adapters)
        self.made = {every: self.all, (): _Part((), None, None, [])}
        self.whole = all(layers is None for layers in batch.layers)

    def at(self, layer: int) -> tuple[_Part, _Part]:
        """The sequences that run the attention half, and those that run the MLP half."""
        if self.whole:
            return self.all, self.all
        attention, mlp = (
            tuple(s for s, layers in enumerate(self.batch.layers) if layers is None or layer in layers[half]) for half in (0, 1)
        )
        return self._part(attention), self._part(mlp)

    def _part(self, places: tuple[int, ...]) -> _Part:
        if places not in self.made:
            part, rows = self.batch.only(places)
            watched = {i: self.taps.attention[s] for i, s in enumerate(places) if s in self.taps.attention}
            plan = self.runner.backend.plan(part, self.runner.spec, Taps(attention=watched))
            self.made[places] = _Part(places, rows.astype(np.int64), plan, own_rows(part))
        return self.made[places]

    def watched(self) -> dict[int, WeightSums]:
        """Statistics of all layers. Each layer ran under one of the plans."""
        backend = self.runner.backend
        found = dict(backend.watched(self.all.plan))
        for part in self.made.values():
            for i, seen in backend.watched(part.plan).items() if part.rows is not None else ():
                before = found[part.places[i]]
                found[part.places[i]] = WeightSums(before.chain + seen.chain, before.nodes + seen.nodes)
        return found
