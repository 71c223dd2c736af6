"""The definition of a drawn token in simple code: full sorts, Python loops, float64, everything computed."""

from __future__ import annotations

import numpy as np

from redraft.config import SamplingParams
from redraft.core.noise import Stream, gumbel, key


def by_rank(values):
    """All places by (value descending, place ascending)."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def enough(order, weights, wanted):
    """The shortest prefix of `order` whose weights sum to `wanted`."""
    held, kept = 0.0, []
    for i in order:
        kept.append(i)
        held += weights[i]
        if held >= wanted:
            break
    return sorted(kept)


def weights_of(values):
    return np.exp(values - values.max()) if np.isfinite(values.max()) else np.ones(len(values))


def processed(logits, params: SamplingParams, context, prompt_len, eos=frozenset(), words=()):
    """(ids, values): the tokens that remain and their float64 logits. words: the token id sequences of bad_words."""
    values = np.array(logits, np.float64)
    output = context[prompt_len:]
    for token, amount in params.logit_bias.items():
        values[token] += amount
    for word in words:
        if context[len(context) - len(word) + 1 :] == word[:-1]:
            values[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        for token in {*params.stop_token_ids, *(() if params.ignore_eos else eos)}:
            values[token] = -np.inf
    for token in set(context):
        values[token] = values[token] / params.repetition_penalty if values[token] > 0 else values[token] * params.repetition_penalty
    for token in set(output):
        values[token] = values[token] - params.frequency_penalty * output.count(token) - params.presence_penalty
    ids = np.arange(len(values))
    if params.greedy:
        return ids, values
    if params.temperature != 1 and np.isfinite(values.max()):
        with np.errstate(over="ignore"):
            values = (values - values.max()) / params.temperature
    if params.top_k > 0:
        kept = sorted(by_rank(values)[: params.top_k])
        ids, values = ids[kept], values[kept]
    if params.top_p < 1:
        weights = weights_of(values)
        kept = enough(by_rank(values), weights, params.top_p * weights.sum())
        ids, values = ids[kept], values[kept]
    if params.min_p > 0:
        kept = [i for i in range(len(values)) if values[i] >= values.max() + np.log(params.min_p)]
        ids, values = ids[kept], values[kept]
    if params.typical_p < 1:
        probs = weights_of(values) / weights_of(values).sum()
        likely = probs[probs > 0]
        entropy = (likely * -np.log(likely)).sum()
        with np.errstate(divide="ignore"):
            distance = np.abs(-np.log(probs) - entropy)
        kept = enough(by_rank(-distance), probs, params.typical_p)
        ids, values = ids[kept], values[kept]
    return ids, values


def token(logits, params: SamplingParams, context, prompt_len, seed, eos=frozenset(), words=()):
    """The token at index len(context)."""
    ids, values = processed(logits, params, context, prompt_len, eos, words)
    noise = 0 if params.greedy else gumbel(key(seed, Stream.TARGET, len(context)), ids)
    return int(ids[by_rank(values + noise)[0]])
