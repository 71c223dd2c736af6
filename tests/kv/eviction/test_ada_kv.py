"""Ada-KV against a plain simulation of its steps: the heads of a layer share its budget exactly."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import given as drawn
from hypothesis import settings

from redraft import registry
from redraft.kv.eviction.ada_kv import AdaKV
from tests.kv.eviction import HEADS, HELD, LANES, LAYERS, Drive, given, grouped, one_by_one, runner

CONTEXT, KEPT = 40, 14
SMALL = AdaKV(budget=KEPT, window=3, pool=1, sinks=2, floor=0.5)  # 14 stay, 7 of them in every head


def opened(method: AdaKV = SMALL) -> Any:
    return method.open(runner())


def plain(method: AdaKV) -> list[list[int]]:
    """Positions after the decision, layer by layer, from the numbered steps of the module."""
    found: list[list[int]] = []
    floor = max(method.sinks + method.window, int(method.floor * KEPT))
    spared = {*range(method.sinks), *range(CONTEXT - method.window, CONTEXT)}
    rows = range(CONTEXT - method.window, CONTEXT)
    for layer in range(LAYERS):
        mine: list[set[int]] = []
        rest: list[tuple[int, int, int]] = []
        for head in range(HEADS):
            mass = {j: sum(given("mass", layer * HEADS + head, row, j) for row in rows if j <= row) for j in range(CONTEXT)}
            best = sorted(range(CONTEXT), key=lambda j: (j in spared, mass[j], j), reverse=True)
            mine.append(set(best[:floor]))
            rest += [(mass[j], head, j) for j in best[floor:]]
        rest.sort(reverse=True)
        for _, head, j in rest[: HEADS * (KEPT - floor)]:
            mine[head].add(j)
        found += [sorted(one) for one in mine]
    return found


@settings(max_examples=12, deadline=None)
@drawn(st.integers(0, 1 << 20), st.booleans(), st.integers(1, 12), st.sampled_from([0.0, 0.2, 0.6, 1.0]))
def test_one_decision_as_the_plain_simulation(seed: int, drafting: bool, window: int, floor: float) -> None:
    method = AdaKV(budget=KEPT, window=window if window < 12 else 11, pool=1, sinks=2, floor=floor)
    policy = opened(method)
    drive = Drive(policy, context=CONTEXT).run(grouped(policy, 70, seed, drafting, CONTEXT))
    assert drive.kept == {CONTEXT: plain(method)}
    for layer in range(LAYERS):
        own = drive.kept[CONTEXT][layer * HEADS : (layer + 1) * HEADS]
        assert sum(map(len, own)) == HEADS * KEPT, "the layer's budget, exactly"


def test_lengths_differ_and_a_floor_of_all_makes_them_equal() -> None:
    lengths = [len(lane) for lane in Drive(opened(), context=CONTEXT).run(one_by_one(CONTEXT)).kept[CONTEXT]]
    assert max(lengths) > KEPT > min(lengths) >= 7
    even = opened(AdaKV(budget=KEPT, window=3, pool=1, sinks=2, floor=1.0))
    assert {len(lane) for lane in Drive(even, context=CONTEXT).run(one_by_one(CONTEXT)).kept[CONTEXT]} == {KEPT}


def test_one_head_may_take_all_above_the_floors_of_the_others_and_most_says_so() -> None:
    policy = opened(AdaKV(budget=KEPT, window=3, pool=1, sinks=2, floor=0.5, drop=10))
    drive = Drive(policy, context=CONTEXT)
    seq, longest = drive.seq, 0
    for stored in range(CONTEXT, 200, 10):
        seq.stored = stored
        tally = seq.state[policy]
        lengths = tally.now(stored)
        longest = max(longest, int(lengths.max())) if stored > CONTEXT else 0
        tally.widen(int(lengths.max()))
        tally.sums[0, ::HEADS] = 1.0
        policy.decide(seq, HELD)
        assert seq.state[policy].lengths.sum() == LANES * KEPT
    assert seq.state[policy].lengths.tolist() == [28, 7, 7] * LAYERS
    assert longest == policy.onset(CONTEXT).longest == 28 + 10


def test_a_fork_goes_its_own_way() -> None:
    policy = opened()
    parent = Drive(policy, context=CONTEXT).run(one_by_one(38))
    child = parent.fork(2).run(one_by_one(10), salt=5)
    assert parent.run(one_by_one(10)).kept == {CONTEXT: plain(SMALL)}
    assert child.kept[CONTEXT] != parent.kept[CONTEXT]


def test_options_are_registry_options() -> None:
    assert set(registry.options(AdaKV)) == {"budget", "window", "pool", "sinks", "drop", "floor"}
