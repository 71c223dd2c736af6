"""Self-attention over a sequence's own pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from redraft.core.spec import Attention, Norm
from redraft.ops.backend import Backend, LayerWeights, NormWeights


def attention(x: Tensor, index: int, mixer: Attention, weights: LayerWeights, backend: Backend, pool: Any, plan: Any) -> Tensor:
    """See Mix. Writes the rows' keys and values, then attends."""
    qkv = backend.linear(x, weights.qkv).view(x.shape[0], mixer.heads + 2 * mixer.kv_heads, mixer.head_dim)
    if mixer.qk_norm is None:  # rotates queries and keys in one call
        turned = backend.rope(qkv.narrow(1, 0, mixer.heads + mixer.kv_heads), mixer, plan)
        q, k = turned.split([mixer.heads, mixer.kv_heads], 1)
    else:
        assert weights.q_norm is not None and weights.k_norm is not None
        q, k = qkv.narrow(1, 0, mixer.heads), qkv.narrow(1, mixer.heads, mixer.kv_heads)
        q, k = (_normed(one, own, mixer, mixer.qk_norm, backend) for one, own in ((q, weights.q_norm), (k, weights.k_norm)))
        q, k = (backend.rope(one.view(len(x), -1, mixer.head_dim), mixer, plan) for one in (q, k))
    v = qkv.narrow(1, mixer.heads + mixer.kv_heads, mixer.kv_heads)
    return backend.linear(backend.attend(index, mixer, q, k, v, pool, plan, weights.sink_logits), weights.out)


def _normed(x: Tensor, weights: NormWeights, mixer: Attention, norm: Norm, backend: Backend) -> Tensor:
    """x [T, heads, D], each head normed alone or all as one vector."""
    if mixer.norm_heads_apart:
        gains = weights.weight.view(x.shape[1], -1)
        return torch.stack([backend.norm(x[:, i], NormWeights(own), norm) for i, own in enumerate(gains)], 1)
    return backend.norm(x.flatten(1) if mixer.norm_heads_together else x, weights, norm)
