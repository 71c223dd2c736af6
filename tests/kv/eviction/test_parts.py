"""The parts of eviction policies, each by itself."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from redraft.core.testing import sequence
from redraft.kv.eviction.parts import Across, Even, Evicting, Full, Mass, SeldomLow, Selector, Tally
from redraft.ops.backend import WeightSums
from tests.kv.eviction import HELD


@given(st.integers(2, 50), st.data())
def test_a_trigger_is_due_when_all_is_taken(budget: int, data: st.DataObject) -> None:
    trigger = Full(budget, data.draw(st.integers(1, budget - 1)))
    held, due = 0, []
    for stored in range(1, 200):
        held += 1
        assert trigger.after(stored - 1, 0) >= stored
        if held == budget:
            assert trigger.after(stored - 1, 0) == stored
            due.append(stored)
            held = trigger.kept(0)
    assert due == [stored for stored in range(1, 200) if trigger.after(stored - 1, 0) == stored]


def seen(chain: list[list[list[float]]], nodes: list[list[list[list[float]]]]) -> WeightSums:
    """chain [w][lanes][slots], nodes [w][N][lanes][slots], of one layer."""
    return WeightSums(np.array(chain, np.float32)[:, None], np.array(nodes, np.float32)[:, :, None])


def test_a_tally_follows_the_path() -> None:
    # two lanes of 2 and 1 committed slots, one chain row, nodes 0..2 of which 2 hangs under 0; 9 must not count
    tally = Tally.start(0, np.array([2, 1]), 1)
    chain = [[[1.0, 2.0, 3.0, 0, 0, 0], [4.0, 5.0, 0, 0, 0, 9.0]]]
    node0 = [[0.1, 0.2, 0.3, 0.5, 9, 9], [0.1, 0.2, 0.5, 9, 9, 9]]
    node1 = [[9.0] * 6, [9.0] * 6]
    node2 = [[10, 20, 30, 40, 9, 60], [10, 20, 30, 9, 50, 9]]
    node0[0][5] = node0[1][4] = 0  # a row gives nothing to what comes after it
    tally.add(seen(chain, [[node0, node1, node2]]), np.array([3, 2]), (0, 2), skip=0)
    assert tally.sums.shape[1:] >= (2, 5)
    assert tally.sums[0, 0, :5].tolist() == pytest.approx([11.1, 22.2, 33.3, 40.5, 60])
    assert tally.sums[0, 1, :4].tolist() == pytest.approx([14.1, 25.2, 30.5, 50])
    assert not tally.sums[0, 0, 5:].any() and not tally.sums[0, 1, 4:].any()
    tally.add(seen(chain, [[node0, node1, node2]]), np.array([3, 2]), (0, 2), skip=1)  # node 0 is too old to count
    assert tally.sums[0, 0, :5].tolist() == pytest.approx([22.1, 44.2, 66.3, 80.5, 120])


def test_a_tally_without_tree_or_path() -> None:
    tally = Tally.start(0, np.array([1]), 2)
    tally.add(WeightSums(np.ones((2, 1, 1, 3), np.float32), np.zeros((2, 0, 1, 1, 3), np.float32)), np.array([3]), (), 0)
    assert tally.sums[..., :3].tolist() == [[[1.0] * 3]] * 2
    tally.add(
        WeightSums(np.ones((2, 1, 1, 5), np.float32), np.full((2, 1, 1, 1, 5), 9.0, np.float32)), np.array([4]), (), 0
    )  # the node was rejected
    assert tally.sums[0, 0, :5].tolist() == [2, 2, 2, 1, 0]


def test_scorers_order_as_they_say() -> None:
    low, mass = np.array([[3.0, 1, 3, 0]]), np.array([[5.0, 1, 6, 2]])
    lengths = np.array([4])
    free = Selector(0, 0)
    assert free.ranks(SeldomLow(1).keys(np.stack([low, mass]), lengths), lengths).tolist() == [[3, 1, 2, 0]]
    assert free.ranks(Mass(1).keys(mass[None], lengths), lengths).tolist() == [[1, 3, 0, 2]]
    assert free.ranks([np.zeros((1, 4))], lengths).tolist() == [[3, 2, 1, 0]], "of equals the older goes"


def test_a_selector_spares_and_keeps_order() -> None:
    keys = [np.array([[0.0, 9, 5, 6, 1, 0], [0.0, 9, 5, 0, 99, 99]])]
    selector = Selector(sinks=1, recent=1)
    ranks = selector.ranks(keys, np.array([6, 4]))
    assert ranks.tolist() == [[1, 2, 4, 3, 5, 0], [1, 2, 3, 0, 5, 4]]  # padding last, whatever it holds
    assert [lane.tolist() for lane in selector.select(ranks, np.array([4, 3]))] == [[0, 1, 3, 5], [0, 1, 3]]


lanes_of_layers = st.tuples(st.integers(1, 3), st.integers(1, 4))


@given(lanes_of_layers, st.integers(0, 1 << 30))
def test_shares_sum_to_the_budget_and_respect_the_floor(shape: tuple[int, int], seed: int) -> None:
    (layers, heads), random = shape, np.random.default_rng(seed)
    kept, floor = int(random.integers(3, 9)), int(random.integers(0, 4))
    lengths = random.integers(max(kept, floor), 14, layers * heads)
    keys = [random.integers(0, 4, (len(lengths), int(lengths.max()))).astype(float)]
    ranks = Selector(1, 1).ranks(keys, lengths)
    assert Even().shares(kept, keys, ranks, lengths).tolist() == [kept] * len(lengths)
    shares = Across(heads, 0.0, floor).shares(kept, keys, ranks, lengths)
    assert (shares.reshape(layers, heads).sum(-1) == heads * kept).all()
    assert (shares >= floor).all() and (shares <= lengths).all()
    for layer in range(layers):  # nothing that went is better than what stayed, but for the floors
        mine = range(layer * heads, (layer + 1) * heads)
        stayed = [keys[0][i, j] for i in mine for j in range(lengths[i]) if floor <= ranks[i, j] < shares[i]]
        went = [keys[0][i, j] for i in mine for j in range(lengths[i]) if ranks[i, j] >= max(shares[i], floor) and ranks[i, j] > 1]
        if floor >= 2 and stayed and went:
            assert min(stayed) >= max(went)


def test_rows_before_the_history_are_not_asked_for() -> None:
    policy = Evicting(1, trigger=Full(10, 4), scorer=SeldomLow(3), selector=Selector(0, 1), allocator=Even())
    seq = sequence([0] * 20)
    assert [(w.statistic, w.since) for w in policy.watch(seq)] == [("low", 7), ("mass", 7)]
    seq.stored = 10
    assert [w.since for w in policy.watch(seq)] == [11, 11]
    long = Evicting(1, trigger=Full(10, 4), scorer=Mass(99), selector=Selector(0, 1), allocator=Even())
    assert [w.since for w in long.watch(sequence([0]))] == [0]


def test_a_commit_that_was_not_observed_is_no_hole() -> None:
    """If a plugin raises between commit and observe, the engine decides at the next step with the statistics that it has."""
    policy = Evicting(1, trigger=Full(4, 2), scorer=Mass(4), selector=Selector(0, 1), allocator=Even())
    seq = sequence([0] * 9)
    seq.state[policy] = policy.begin(seq)
    seq.stored = 2
    policy.observe(seq, WeightSums(np.array([[[[1.0, 2]]]], np.float32), np.zeros((1, 0, 1, 1, 2), np.float32)), 2, ())
    seq.stored = 4
    kept = policy.decide(seq, HELD)
    assert kept is not None and kept.slots[0].tolist() == [1, 3]
    seq.stored = 5
    policy.observe(seq, None, 1, ())
    assert policy.decide(seq, HELD) is None and seq.state[policy].now(5).tolist() == [3]
