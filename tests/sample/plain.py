"""The definition of a drawn token in simple code: full sorts, Python loops, float64, everything computed."""

from __future__ import annotations

import numpy as np

from redraft.config import SamplingParams
from redraft.core.noise import Stream, gumbel, key, uniform


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


def dry(params: SamplingParams, context, spelled):
    """token -> what is subtracted. spelled: the text of each token."""
    seen = context if params.dry_penalty_last_n < 0 else context[max(0, len(context) - params.dry_penalty_last_n) :]
    found = {}
    for at in range(1, len(seen)):  # the token at `at` came after a repetition of the text's end
        n = 0
        while n < at and seen[at - 1 - n] == seen[len(seen) - 1 - n]:
            end = "".join(spelled[token] for token in context[: len(context) - n])  # a breaker that ends in the last token of this
            before = "".join(spelled[token] for token in context[: len(context) - n - 1])
            if any(end.count(breaker) > before.count(breaker) for breaker in params.dry_sequence_breakers):
                break
            n += 1
        if n >= params.dry_allowed_length and not any(breaker in spelled[seen[at]] for breaker in params.dry_sequence_breakers):
            found[seen[at]] = max(found.get(seen[at], 0), params.dry_multiplier * params.dry_base ** (n - params.dry_allowed_length))
    return found


def processed(logits, params: SamplingParams, context, prompt_len, eos=frozenset(), words=(), seed=0, spelled=(), surprises=()):
    """(ids, values): the tokens that remain and their float64 logits. words: the token id sequences of bad_words; spelled: the text of
    each token; surprises: of each new token."""
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
    if params.dry_multiplier and params.dry_penalty_last_n:
        for token, amount in dry(params, context, spelled).items():
            values[token] -= amount
    ids = np.arange(len(values))
    if params.greedy:
        return ids, values
    if params.temperature != 1 and not params.dynatemp_range and np.isfinite(values.max()):
        with np.errstate(over="ignore"):
            values = (values - values.max()) / params.temperature
    if params.top_n_sigma > 0 and np.isfinite(values.max()):
        with np.errstate(over="ignore"):
            deviation = np.std(values[np.isfinite(values)])
        kept = [i for i in range(len(values)) if values[i] >= values.max() - params.top_n_sigma * deviation]
        ids, values = ids[kept], values[kept]
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
    if uniform(key(seed, Stream.COIN, len(context)), np.zeros(1, np.int64))[0] < params.xtc_probability:
        weights = weights_of(values)
        likely = [i for i in by_rank(values) if weights[i] >= params.xtc_threshold * weights.sum()]
        kept = [i for i in range(len(values)) if i not in likely[:-1]]
        ids, values = ids[kept], values[kept]
    if params.dynatemp_range and len(values) > 1 and np.isfinite(values.max()):
        probs = weights_of(values) / weights_of(values).sum()
        likely = probs[probs > 0]
        share = min(1.0, max(0.0, -(likely * np.log(likely)).sum() / np.log(len(values))))
        low, high = max(0.0, params.temperature - params.dynatemp_range), params.temperature + params.dynatemp_range
        if temperature := low + (high - low) * share**params.dynatemp_exponent:
            with np.errstate(over="ignore"):
                values = (values - values.max()) / temperature
        else:
            ids, values = ids[[by_rank(values)[0]]], values[[by_rank(values)[0]]]
    if params.mirostat:
        mu = 2 * params.mirostat_tau - params.mirostat_eta * (sum(surprises) - len(surprises) * params.mirostat_tau)
        probs = weights_of(values) / weights_of(values).sum()
        with np.errstate(divide="ignore"):
            kept = [i for i in range(len(values)) if -np.log2(probs[i]) <= mu or i == by_rank(values)[0]]
        ids, values = ids[kept], values[kept]
    return ids, values


def surprise(ids, values, token):
    """Of a token that the row draws, in bits."""
    probs = weights_of(values) / weights_of(values).sum()
    return -np.log2(probs[list(ids).index(token)]) if token in ids and probs[list(ids).index(token)] else 32.0


def token(logits, params: SamplingParams, context, prompt_len, seed, eos=frozenset(), words=(), spelled=(), surprises=()):
    """The token at index len(context)."""
    ids, values = processed(logits, params, context, prompt_len, eos, words, seed, spelled, surprises)
    noise = 0 if params.greedy else gumbel(key(seed, Stream.TARGET, len(context)), ids)
    return int(ids[by_rank(values + noise)[0]])
