"""One decoder layer: the only Python that interprets a LayerSpec."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from redraft.models.spec import Experts, LayerSpec
from redraft.ops.backend import Backend, LayerWeights


def decoder_layer(h: Tensor, index: int, layer: LayerSpec, weights: LayerWeights, backend: Backend, pool: Any, plan: Any) -> Tensor:
    """h [T, hidden] -> [T, hidden]: attention, then the feed-forward part, each behind its norm and added to h."""
    h = h + _attention(backend.norm(h, weights.attn_norm, layer.norm), index, layer, weights, backend, pool, plan)
    return h + _feed_forward(backend.norm(h, weights.mlp_norm, layer.norm), layer, weights, backend)


def _attention(x: Tensor, index: int, layer: LayerSpec, weights: LayerWeights, backend: Backend, pool: Any, plan: Any) -> Tensor:
    qkv = backend.linear(x, weights.qkv).view(x.shape[0], layer.heads + 2 * layer.kv_heads, layer.head_dim)
    if layer.qk_norm is None:  # queries and keys turn in one call
        turned = backend.rope(qkv.narrow(1, 0, layer.heads + layer.kv_heads), layer, plan)
        q, k = turned.split([layer.heads, layer.kv_heads], 1)
    else:
        assert weights.q_norm is not None and weights.k_norm is not None
        q = backend.rope(backend.norm(qkv.narrow(1, 0, layer.heads), weights.q_norm, layer.qk_norm), layer, plan)
        k = backend.rope(backend.norm(qkv.narrow(1, layer.heads, layer.kv_heads), weights.k_norm, layer.qk_norm), layer, plan)
    v = qkv.narrow(1, layer.heads + layer.kv_heads, layer.kv_heads)
    return backend.linear(backend.attend(index, layer, q, k, v, pool, plan), weights.out)


def _feed_forward(x: Tensor, layer: LayerSpec, weights: LayerWeights, backend: Backend) -> Tensor:
    if isinstance(layer.mlp, Experts):
        return backend.experts(x, weights, layer.mlp)
    assert weights.up is not None and weights.down is not None
    return backend.linear(backend.activate(backend.linear(x, weights.up), layer.mlp.activation, layer.mlp.gated), weights.down)
