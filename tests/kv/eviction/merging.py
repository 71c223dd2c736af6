"""One decision of a policy that merges, on keys and values made by hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from redraft.core.sequence import Sequence
from redraft.core.testing import sequence
from redraft.kv.slots import Held, Kept
from tests.kv.eviction import LANES, runner

SIZE = 8


class Decided(NamedTuple):
    """keys, values: f32[lanes, context, SIZE]; sums: of the statistics, f64[statistics, lanes, context]."""

    policy: Any
    seq: Sequence
    kept: Kept
    keys: Any
    values: Any
    sums: Any


def walk(context: int, seed: int = 0) -> Any:
    """Random keys or values of neighbours that are alike."""
    return np.cumsum(np.random.default_rng(seed).standard_normal((LANES, context, SIZE)), 1).astype(np.float32)


def decide(method: Any, context: int, keys: Any, values: Any, seed: int = 0) -> Decided:
    policy, seq = method.open(runner()), sequence([0])
    seq.prompt_len = context
    seq.state[policy] = tally = policy.begin(seq)
    seq.stored = context
    tally.widen(context)
    tally.sums[...] = np.random.default_rng(seed + 100).random(tally.sums.shape)
    sums = tally.sums[..., :context].copy()
    held = Held(lambda: [np.arange(context, dtype=np.int32)] * LANES, lambda lane: (keys[lane, None], values[lane, None]))
    kept = policy.decide(seq, held)
    assert kept is not None
    return Decided(policy, seq, kept, keys, values, sums)


def contents(found: Decided, lane: int) -> tuple[Any, Any]:
    """The keys and values of what the lane keeps, after the decision."""
    keys, values = found.keys[lane, found.kept.slots[lane]], found.values[lane, found.kept.slots[lane]]
    if (merged := found.kept.merged) is not None:
        mine = merged.lanes == lane
        keys[merged.slots[mine]], values[merged.slots[mine]] = merged.keys[mine], merged.values[mine]
    return keys, values
