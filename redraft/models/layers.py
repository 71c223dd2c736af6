"""One decoder layer and its two halves. Only this Python code interprets a LayerSpec."""

from __future__ import annotations

from typing import Any

from redraft.core.spec import Experts, LayerSpec, Mlp, Norm
from redraft.models.mixers import MIXERS
from redraft.ops.arrays import Tensor, times
from redraft.ops.backend import Backend, LayerWeights, LinearWeights, NormWeights, limited


def decoder_layer(h: Tensor, index: int, layer: LayerSpec, weights: LayerWeights, backend: Backend, pool: Any, plan: Any) -> Tensor:
    """h [T, hidden] -> [T, hidden]. index, pool: see Mix."""
    return fed(h, attended(h, index, layer, weights, backend, pool, plan), layer, weights, backend)


def attended(h: Tensor, index: int, layer: LayerSpec, weights: LayerWeights, backend: Backend, pool: Any, plan: Any) -> Tensor:
    """The first half of a layer: h [T, hidden] with what the mixer makes of it added, as the spec says."""
    x = _normed(h, weights.attn_norm, layer.norm, backend)
    mixed = MIXERS[type(layer.mixer)](x, index, layer.mixer, weights, backend, pool, plan)
    return _added(h, mixed, weights.attn_post_norm, layer, backend)


def fed(h: Tensor, after: Tensor, layer: LayerSpec, weights: LayerWeights, backend: Backend) -> Tensor:
    """The second half: `after` [T, hidden], what the first half returned, with the feed-forward part added. h: the input of the layer."""
    x = _normed(h if layer.parallel else after, weights.mlp_norm, layer.norm, backend)
    return _added(after, _feed_forward(x, layer, weights, backend), weights.mlp_post_norm, layer, backend)


def _normed(x: Tensor, weights: NormWeights | None, norm: Norm | None, backend: Backend) -> Tensor:
    return x if norm is None or weights is None else backend.norm(x, weights, norm)


def _added(h: Tensor, y: Tensor, post: NormWeights | None, layer: LayerSpec, backend: Backend) -> Tensor:
    y = _normed(y, post, layer.post_norm, backend)
    added: Tensor = h + (y if layer.residual == 1.0 else times(y, layer.residual))
    return added


def _feed_forward(x: Tensor, layer: LayerSpec, weights: LayerWeights, backend: Backend) -> Tensor:
    if not isinstance(layer.mlp, Experts):
        return _mlp(x, layer.mlp, weights.up, weights.down, backend)
    out = backend.experts(x, weights, layer.mlp)
    if layer.mlp.shared is None:
        return out
    beside = _mlp(x, layer.mlp.shared, weights.shared_up, weights.shared_down, backend)
    if weights.shared_gate is not None:
        beside = beside * backend.activate(backend.linear(x, weights.shared_gate), "sigmoid", False)
    return out + beside


def _mlp(x: Tensor, mlp: Mlp, up: LinearWeights | None, down: LinearWeights | None, backend: Backend) -> Tensor:
    assert up is not None and down is not None
    return backend.linear(backend.activate(limited(backend.linear(x, up), mlp), mlp.activation, mlp.gated), down)
