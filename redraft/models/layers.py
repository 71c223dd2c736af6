"""One decoder layer. Only this Python code interprets a LayerSpec."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from redraft.core.spec import Experts, LayerSpec
from redraft.models.mixers import MIXERS
from redraft.ops.backend import Backend, LayerWeights


def decoder_layer(h: Tensor, index: int, layer: LayerSpec, weights: LayerWeights, backend: Backend, pool: Any, plan: Any) -> Tensor:
    """h [T, hidden] -> [T, hidden]: the mixer, then the feed-forward part. Each after its norm, added to h. index, pool: see Mix."""
    x = backend.norm(h, weights.attn_norm, layer.norm)
    h = h + MIXERS[type(layer.mixer)](x, index, layer.mixer, weights, backend, pool, plan)
    return h + _feed_forward(backend.norm(h, weights.mlp_norm, layer.norm), layer, weights, backend)


def _feed_forward(x: Tensor, layer: LayerSpec, weights: LayerWeights, backend: Backend) -> Tensor:
    if isinstance(layer.mlp, Experts):
        return backend.experts(x, weights, layer.mlp)
    assert weights.up is not None and weights.down is not None
    return backend.linear(backend.activate(backend.linear(x, weights.up), layer.mlp.activation, layer.mlp.gated), weights.down)
