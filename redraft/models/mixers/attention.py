"""Self-attention over a sequence's own pages."""

from __future__ import annotations

from typing import Any

from redraft.core.spec import Attention, Norm
from redraft.ops.arrays import Tensor, namespace
from redraft.ops.backend import Backend, LayerWeights, NormWeights


def attention(x: Tensor, index: int, mixer: Attention, weights: LayerWeights, backend: Backend, pool: Any, plan: Any) -> Tensor:
    """See Mix. Writes the rows' keys and values, then attends."""
    rows, keys, values = len(x), mixer.heads, mixer.heads + mixer.kv_heads  # the first heads of each
    qkv = backend.linear(x, weights.qkv).reshape(rows, values + mixer.kv_heads, mixer.head_dim)
    if mixer.qk_norm is None:  # rotates queries and keys in one call
        turned = backend.rope(qkv[:, :values], mixer, plan)
        q, k = turned[:, :keys], turned[:, keys:]
    else:
        assert weights.q_norm is not None and weights.k_norm is not None
        q, k = qkv[:, :keys], qkv[:, keys:values]
        q, k = (_normed(one, own, mixer, mixer.qk_norm, backend) for one, own in ((q, weights.q_norm), (k, weights.k_norm)))
        q, k = (backend.rope(one.reshape(rows, -1, mixer.head_dim), mixer, plan) for one in (q, k))
    v = qkv[:, values:]
    return backend.linear(backend.attend(index, mixer, q, k, v, pool, plan, weights.sink_logits), weights.out)


def _normed(x: Tensor, weights: NormWeights, mixer: Attention, norm: Norm, backend: Backend) -> Tensor:
    """x [T, heads, D], each head normed alone or all as one vector."""
    if mixer.norm_heads_apart:
        gains = weights.weight.reshape(x.shape[1], -1)
        found: Tensor = namespace(x).stack([backend.norm(x[:, i], NormWeights(own), norm) for i, own in enumerate(gains)], axis=1)
        return found
    return backend.norm(x.reshape(len(x), x.shape[1] * x.shape[2]) if mixer.norm_heads_together else x, weights, norm)
