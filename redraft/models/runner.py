"""A model that runs: spec, weights, backend and its own cache. The loop over layers is here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from redraft.core.batch import Batch
from redraft.core.taps import NOTHING, Taps
from redraft.kv.store import Store
from redraft.kv.table import PageTable
from redraft.models.layers import decoder_layer
from redraft.models.spec import ModelSpec
from redraft.ops.backend import Backend, Outputs, Weights


class Runner:
    """Owns the page table and the store of one model; a draft model is a second Runner with its own (see companion.py).

    source: the checkpoint's folder, None for weights from elsewhere; draft_model: the checkpoint that drafters with a
    second model use unless they name one; companions: the second models loaded so far, by folder.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        backend: Backend,
        slabs: int,
        *,
        sharing: bool = True,
        source: Path | None = None,
        draft_model: str | None = None,
    ) -> None:
        self.spec, self.weights, self.backend = spec, weights, backend
        self.source, self.draft_model = source, draft_model
        self.companions: dict[Path, Runner] = {}
        self.table = PageTable(slabs, len(spec.layers), spec.kv_heads, sharing=sharing)
        self.store = Store(backend, spec, slabs)

    @torch.inference_mode()
    def forward(self, batch: Batch, taps: Taps = NOTHING) -> Outputs:
        """Embed, segments of layers, head on the wanted rows. Keys and values of all rows are written on the way."""
        backend, spec, weights = self.backend, self.spec, self.weights
        plan = backend.plan(batch, spec)
        h = backend.embed(weights, plan)
        hidden = {}
        for first, last in self.segments(taps):
            for i in range(first, last):
                h = decoder_layer(h, i, spec.layers[i], weights.layers[i], backend, self.store.pool, plan)
            if last - 1 in taps.hidden:
                hidden[last - 1] = h
        out = backend.head(h, weights, spec.final_norm, plan, taps)
        return Outputs(out.argmax, out.top_k, out.logits, hidden) if hidden else out

    def segments(self, taps: Taps) -> Iterator[tuple[int, int]]:
        """Runs of layers that nobody looks into: cut behind every tapped layer."""
        first = 0
        for last in sorted(taps.hidden | {len(self.spec.layers) - 1}):
            yield first, last + 1
            first = last + 1
