"""Attention in parts is attention, and the roofline has the limits that it must have."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.sim.lamina import Device, Model, Network, Partial, attend, homogeneous, merged, offloaded

H100, H20 = Device(989e12, 3.35e12, 80e9, 11.06), Device(148e12, 4.0e12, 96e9, 4.63)
LLAMA_65B = Model(65e9, 80, 8192)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 20), max_size=4), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_any_split_of_the_tokens_merges_to_the_whole(seed: int, cuts: list[int], scale: float) -> None:
    draw = np.random.default_rng(seed)
    q, k, v = scale * draw.normal(size=(3, 8)), scale * draw.normal(size=(20, 8)), draw.normal(size=(20, 8))
    edges = [0, *sorted(cuts), 20]
    parts = [attend(q, k[a:b], v[a:b]) for a, b in pairwise(edges)]
    whole, found = attend(q, k, v), merged(parts)
    np.testing.assert_allclose(found.out, whole.out, atol=1e-12)
    np.testing.assert_allclose(found.lse, whole.lse, atol=1e-12)


def test_a_new_token_is_merged_by_one_weight() -> None:
    draw = np.random.default_rng(1)
    q, k, v = draw.normal(size=(1, 8)), draw.normal(size=(9, 8)), draw.normal(size=(9, 8))
    before = attend(q, k[:8], v[:8])
    w = 1 / (1 + np.exp(before.lse - q @ k[8] / np.sqrt(8)))
    np.testing.assert_allclose((1 - w) * before.out + w * v[8], attend(q, k, v).out, atol=1e-12)
    empty = Partial(np.zeros((1, 8)), np.array([-np.inf]))
    np.testing.assert_allclose(merged([empty, before]).out, before.out)


def test_a_network_without_cost_is_never_slower() -> None:
    slow = offloaded(LLAMA_65B, H100, 2, H20, 4, 4096)
    assert offloaded(LLAMA_65B, H100, 2, H20, 4, 4096, Network(1e30, 0)).step <= slow.step


def test_attention_devices_hold_more_texts() -> None:
    assert offloaded(LLAMA_65B, H100, 2, H20, 4, 8192).batch / homogeneous(LLAMA_65B, H100, 4, 8192).batch == pytest.approx(384 / 190)
