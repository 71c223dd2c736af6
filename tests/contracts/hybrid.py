"""A tiny hybrid model with toy recurrent layers and attention, a backend that computes them, and their definition."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redraft.core.batch import Batch
from redraft.core.spec import ModelSpec, Recurrent
from redraft.core.taps import NO_TAPS, Taps
from redraft.kv.memory import Memories
from redraft.kv.paged import Paged
from redraft.models.mixers import MIXERS
from redraft.models.runner import Runner
from redraft.ops.backend import LayerWeights, Linear, Weights
from redraft.ops.reference import Reference
from redraft.ops.torch_ops import TorchOps
from tests.arrays import placed
from tests.contracts import plain
from tests.kv.state import State

SIZE = 16


class Gated(Recurrent):
    """s' = g s + (1 - g) v, with g and v from the row, so the order of rows matters."""


def step(state: Tensor, row: Tensor) -> Tensor:
    gate, value = row.chunk(2, -1)
    gate = torch.sigmoid(gate)
    return gate * state + (1 - gate) * torch.tanh(value + state.roll(1, -1))


class _Scans:
    """Adds the toy layer to a backend: rows run one after the other, each from the state in its slot."""

    mixers = frozenset({*TorchOps.mixers, Gated})

    def plan(self, batch: Batch, spec: ModelSpec, taps: Taps = NO_TAPS) -> Any:
        made = super().plan(batch, spec, taps)  # type: ignore[misc]
        (view,) = batch.pages.states
        vars(made)["states"] = [[slot for own in part for slot in own.tolist()] for part in view]  # also in a frozen plan
        return made

    def scan(self, index: int, rows: Tensor, pool: Tensor, plan: Any) -> Tensor:
        out = rows.new_empty(len(rows), SIZE)
        for i, (read, write) in enumerate(zip(*plan.states, strict=True)):
            out[i] = pool[write, index] = step(pool[read, index], rows[i])
        return out


class HybridReference(_Scans, Reference):
    pass


class HybridTorch(_Scans, TorchOps):
    pass


BACKENDS: dict[str, Any] = {"reference": HybridReference, "torch": HybridTorch}


def gated(x: Tensor, index: int, mixer: Gated, weights: LayerWeights, backend: Any, pool: Tensor, plan: Any) -> Tensor:
    mixed: Tensor = backend.linear(backend.scan(index, backend.linear(x, weights.qkv), pool, plan), weights.out)
    return mixed


def defined(rows: plain.Numbers, mixer: Gated) -> plain.Numbers:
    """The definition: one row after the other."""
    state, found = np.zeros(mixer.state), []
    for row in rows:
        gate, value = np.split(row, 2)
        gate = 1 / (1 + np.exp(-gate))
        state = gate * state + (1 - gate) * np.tanh(value + np.roll(state, 1))
        found.append(state)
    return np.stack(found)


MIXERS[Gated] = gated
plain.MIXERS[Gated] = defined


@lru_cache
def tiny() -> tuple[ModelSpec, Weights]:
    """plain.tiny with recurrent layers before, between and after its attention layers. Two recurrent layers are adjacent."""
    spec, weights = plain.tiny(layers=3)
    dice = np.random.default_rng(7)

    def rand(rows: int, cols: int, scale: float) -> Linear:
        return Linear(dice.standard_normal((rows, cols)) * scale / math.sqrt(cols))

    def recurrent(like: LayerWeights) -> LayerWeights:
        return replace(like, qkv=rand(2 * SIZE, spec.hidden, 3.0), out=rand(spec.hidden, SIZE, 0.5))

    (full, *_), layer, (a, b, c) = spec.layers, replace(spec.layers[0], mixer=Gated((SIZE,))), weights.layers
    made = replace(spec, layers=(layer, full, full, layer, full, layer))
    return made, replace(weights, layers=(recurrent(a), a, b, recurrent(b), c, recurrent(c)))


def runner(backend: str, blocks: int, *, sharing: bool = True) -> Runner:
    spec, weights = tiny()
    made = BACKENDS[backend](torch.float64, "cpu")
    memory = Memories(Paged(made, spec, blocks, sharing=sharing), State(spec, 40 * blocks, blocks, sharing=sharing))
    return Runner(spec, placed(made, weights), made, blocks, memory=memory)
