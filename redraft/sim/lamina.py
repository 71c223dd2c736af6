"""Lamina: attention of decoding texts on cheap devices with much memory, the rest on fast ones.

Shaoyuan Chen, Wencong Xiao, Yutong Lin, Mingxing Zhang, Yingdi Shan, Jinlei Jiang, Kang Chen, Yongwei Wu, Efficient and Economic Large
Language Model Inference with Attention Offloading, 2024, arXiv 2405.01814.

1. Keys and values lie on attention devices. Partial results over any parts of the cached tokens merge to the attention over all of them.
2. The other layers run on model devices. Queries, keys, values and attention outputs cross the network once a layer.
3. Two batches alternate, so that both sides work. A step takes what the slower side takes, or the way through both.

Differs: a roofline without kernels, and no prefill.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from redraft.core.tree import F64


class Partial(NamedTuple):
    """Attention over some of the tokens. out: f64[rows, dim]; lse: f64[rows], the logarithm of the sum of exponentials, -inf for none."""

    out: F64
    lse: F64


def attend(q: F64, k: F64, v: F64) -> Partial:
    """q: f64[rows, dim]; k, v: f64[tokens, dim]."""
    scores = q @ k.T / np.sqrt(q.shape[1])
    top = scores.max(1, initial=-np.inf, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(1)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + np.where(np.isfinite(top[:, 0]), top[:, 0], 0.0)
    return Partial(weights @ v / np.maximum(total, 1e-300)[:, None], lse)


def merged(parts: Iterable[Partial]) -> Partial:
    """Attention over all tokens from that over disjoint parts of them, of which one has tokens."""
    outs, lses = map(np.stack, zip(*parts, strict=True))
    lse = np.logaddexp.reduce(lses)
    return Partial((np.exp(lses - lse)[..., None] * outs).sum(0), lse)


# ---- throughput


@dataclass(frozen=True)
class Device:
    """flops: a second; bandwidth: bytes a second; memory: bytes; price: dollars an hour."""

    flops: float
    bandwidth: float
    memory: float
    price: float


@dataclass(frozen=True)
class Model:
    """weights: parameters, of `size` bytes each; groups: query heads for each head of keys and values."""

    weights: float
    layers: int
    hidden: int
    groups: int = 1
    size: int = 2

    @property
    def token_bytes(self) -> float:
        return 2 * self.layers * self.hidden / self.groups * self.size


@dataclass(frozen=True)
class Network:
    """bandwidth: bytes a second; trip: seconds of a way there and back."""

    bandwidth: float = 5e10
    trip: float = 33e-6


class Speed(NamedTuple):
    """batch: texts that fit; step: seconds between two tokens of a text; tokens: a second; per_dollar: tokens."""

    batch: float
    step: float
    tokens: float
    per_dollar: float


def _linear(model: Model, batch: float, device: Device, count: int) -> float:
    """Seconds of a step without attention."""
    return max(2 * model.weights * batch / device.flops, model.weights * model.size / device.bandwidth) / count


def _attention(model: Model, batch: float, context: float, device: Device, count: int) -> float:
    flops = 4 * batch * context * model.hidden * model.layers
    return max(flops / device.flops, batch * context * model.token_bytes / device.bandwidth) / count


def homogeneous(model: Model, device: Device, count: int, context: float) -> Speed:
    """All on `count` equal devices."""
    batch = (count * device.memory - model.weights * model.size) / (context * model.token_bytes)
    step = _linear(model, batch, device, count) + _attention(model, batch, context, device, count)
    return Speed(batch, step, batch / step, 3600 * batch / step / (count * device.price))


def offloaded(model: Model, fast: Device, a: int, large: Device, b: int, context: float, network: Network = Network()) -> Speed:
    """Attention on `b` large devices, the rest on `a` fast ones."""
    batch = b * large.memory / (context * model.token_bytes)
    linear, attention = _linear(model, batch / 2, fast, a), _attention(model, batch / 2, context, large, b)
    crossing = (2 + 2 / model.groups) * model.size * model.hidden * batch / 2 * model.layers / network.bandwidth
    step = max(2 * linear, 2 * attention, linear + attention + crossing + model.layers * network.trip)
    return Speed(batch, step, batch / step, 3600 * batch / step / (a * fast.price + b * large.price))
