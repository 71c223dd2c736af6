"""The definition of a text: a dense forward pass over all tokens for each new token, without cache, engine or redraft.ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redraft.config import SamplingParams
from redraft.core.noise import Stream, gumbel, key
from redraft.core.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm, Rotary, WeightSource
from redraft.ops.arrays import array
from redraft.ops.backend import LayerWeights, Linear, NormWeights, Weights

Numbers = NDArray[np.float64]

VOCAB = 24


@lru_cache
def tiny(window: int | None = None, seed: int = 15, layers: int = 2) -> tuple[ModelSpec, Weights]:
    """A random Llama-like model, float64. The head is untied, and queries and keys are large, so attention selects few tokens. So
    texts are varied and depend on every earlier token."""
    hidden, heads, kv_heads, size, inner = 32, 4, 2, 8, 48
    dice = np.random.default_rng(seed)

    def rand(*shape: int, scale: float) -> Numbers:
        return dice.standard_normal(shape) * scale

    def norm() -> NormWeights:
        return NormWeights(1 + rand(hidden, scale=0.1))

    rotary = Rotary(tuple(float(100.0 ** (-i / (size // 2))) for i in range(size // 2)))
    mixer = Attention(heads, kv_heads, size, rotary, window)
    layer = LayerSpec(mixer, Mlp(inner))
    spec = ModelSpec(VOCAB, hidden, 256, (layer,) * layers, Norm(), False, lambda name: WeightSource((name,)))
    made = []
    for _ in range(layers):
        qkv = rand(mixer.qkv_rows, hidden, scale=1 / math.sqrt(hidden))
        qkv[: (heads + kv_heads) * size] *= 1.7  # makes attention selective
        made.append(
            LayerWeights(
                attn_norm=norm(),
                qkv=Linear(qkv),
                out=Linear(rand(hidden, heads * size, scale=2 / math.sqrt(heads * size))),
                mlp_norm=norm(),
                up=Linear(rand(2 * inner, hidden, scale=1 / math.sqrt(hidden))),
                down=Linear(rand(hidden, inner, scale=1.5 / math.sqrt(inner))),
            )
        )
    head = rand(VOCAB, hidden, scale=2.0 / math.sqrt(hidden))
    return spec, Weights(rand(VOCAB, hidden, scale=1.0), Linear(head), norm(), tuple(made))


def logits(spec: ModelSpec, weights: Weights, tokens: Seq[int]) -> Numbers:
    """[T, V] from weights of any library in float64; Llama-like models only (RMS norm, gated SiLU, rotary, optional window), whose mixers
    are in MIXERS."""
    x = array(weights.embed)[list(tokens)]
    for layer, w in zip(spec.layers, weights.layers, strict=True):
        x = x + linear(MIXERS[type(layer.mixer)](linear(rms(x, w.attn_norm, layer.norm), w.qkv), layer.mixer), w.out)
        x = x + mlp(rms(x, w.mlp_norm, layer.norm), w)
    return linear(rms(x, weights.final_norm, spec.final_norm), weights.head)


def attention(qkv: Numbers, mixer: Attention, at: NDArray[np.int64] | None = None) -> Numbers:
    """at: the positions of the rows, if they are not all of a text."""
    at = np.arange(len(qkv)) if at is None else at
    h, k, d = mixer.heads, mixer.kv_heads, mixer.head_dim
    q, keys, values = np.split(qkv.reshape(len(at), h + 2 * k, d), [h, h + k], 1)
    q, keys = turn(q, mixer, at), turn(keys, mixer, at)
    keys, values = keys.repeat(h // k, 1), values.repeat(h // k, 1)
    scores = np.einsum("qhd,khd->hqk", q, keys) / math.sqrt(d)
    behind = at[:, None] - at[None, :]
    seen = (behind >= 0) & (behind < (mixer.window or behind.max(initial=0) + 1))
    return np.einsum("hqk,khd->qhd", softmax(np.where(seen, scores, -math.inf)), values).reshape(len(at), h * d)


# the input projection of all rows -> what the output projection gets
MIXERS: dict[type, Callable[[Numbers, Any], Numbers]] = {Attention: attention}


def linear(x: Numbers, weights: Linear) -> Numbers:
    made: Numbers = x @ array(weights.weight).T
    return made if weights.bias is None else made + array(weights.bias)


def mlp(x: Numbers, weights: LayerWeights) -> Numbers:
    assert weights.up is not None and weights.down is not None
    gate, up = np.split(linear(x, weights.up), 2, -1)
    return linear(gate / (1 + np.exp(-gate)) * up, weights.down)


def rms(x: Numbers, weights: NormWeights, norm: Norm) -> Numbers:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + norm.eps) * array(weights.weight)


def softmax(x: Numbers) -> Numbers:
    raised = np.exp(x - x.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def turn(x: Numbers, mixer: Attention, at: NDArray[np.int64]) -> Numbers:
    assert mixer.rotary is not None
    angles = at[:, None, None] * np.array(mixer.rotary.frequencies)
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)


def draw(row: Numbers, params: SamplingParams, seed: int, tokens: Seq[int]) -> tuple[int, float]:
    """The token drawn after `tokens`, with repetition penalty, temperature and top-p, and its margin. The margin is the smaller of
    two distances: to the second best token (after noise), and from the last kept token to the first dropped token."""
    x = row.copy()
    for token in set(tokens):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    if params.temperature == 0:
        return int(x.argmax()), _gap(x)
    x = x / params.temperature
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    weights = np.exp(x - x.max())
    probs = weights / weights.sum()
    kept, mass, cut = [], 0.0, math.inf
    for token in order:
        if mass >= params.top_p:
            break
        kept.append(token)
        mass += float(probs[token])
        cut = min(cut, abs(mass - params.top_p))
    if params.top_p == 1:
        kept, cut = order, math.inf
    elif len(kept) < len(order):
        cut = min(cut, float(x[kept[-1]] - x[order[len(kept)]]))
    ids = np.array(sorted(kept))
    noisy = x[ids] + gumbel(key(seed, Stream.TARGET, len(tokens)), ids)
    return int(ids[noisy.argmax()]), min(_gap(noisy), cut)


def _gap(values: np.ndarray) -> float:
    if len(values) < 2:
        return math.inf
    second, first = np.sort(values)[-2:]
    return float(first - second)


def generate(
    spec: ModelSpec, weights: Weights, prompt: Seq[int], params: SamplingParams, *, seed: int | None = None, eos: Iterable[int] = ()
) -> list[int]:
    """New tokens, one at a time, each from a dense forward pass over all earlier tokens."""
    assert params.seed is not None or seed is not None or params.temperature == 0
    assert params.max_tokens is not None
    tokens, ends = list(prompt), set(eos)
    for _ in range(params.max_tokens):
        token, _ = draw(logits(spec, weights, tokens)[-1], params, seed if seed is not None else params.seed or 0, tokens)
        tokens.append(token)
        if token in ends:
            break
    return tokens[len(prompt) :]
