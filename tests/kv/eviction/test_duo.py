"""Streaming heads: their lanes hold what later rows see, other lanes hold all."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from redraft.core.sequence import NEVER, UNLIMITED
from redraft.errors import InvalidInput
from redraft.kv.eviction.duo import Duo, DuoAttention
from tests.kv.eviction import HEADS, LAYERS, Drive, grouped

STREAMS = np.arange(LAYERS * HEADS).reshape(LAYERS, HEADS) % 2 == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.integers(1, 23), st.sampled_from([4, 8]), st.integers(0, 1 << 20), st.booleans())
def test_the_ring_holds_what_the_mask_shows(sinks: int, local: int, page: int, seed: int, drafting: bool) -> None:
    policy = Duo(STREAMS, sinks, local, page)
    assert policy.window is not None and not policy.window.turned
    drive = Drive(policy, page=page)
    for step in grouped(policy, 100, seed, drafting):
        drive.step(step)
        stored = drive.seq.stored
        wanted = {j for j in range(stored) if j < sinks or any(row - j < local for row in range(stored, stored + 4))}
        for lane, streams in zip(drive.positions(), STREAMS.ravel(), strict=True):
            if streams:
                assert wanted <= set(lane), "a later row misses a key"
                assert len(lane) < sinks + local + 2 * page + policy.sync_every
            else:
                assert lane == list(range(stored))
    assert all(policy.window.holds(i // HEADS, i % HEADS) == bool(streams) for i, streams in enumerate(STREAMS.ravel()))


@pytest.mark.parametrize(("sinks", "local", "page"), [(0, 1, 4), (5, 13, 4), (128, 256, 32)])
def test_its_onset_is_what_it_does(sinks: int, local: int, page: int) -> None:
    policy = Duo(STREAMS, sinks, local, page)
    onset, drive = policy.onset(0), Drive(Duo(STREAMS, sinks, local, page), page=page)
    drive.run(grouped(drive.policy, onset.at, 1, False))
    assert list(drive.kept) == [onset.at] and onset.shareable == sinks + local
    held = [len(lane) for lane in drive.positions()]
    assert sum(held) / len(held) <= onset.slots < sum(held) / len(held) + 1


def test_no_streaming_head_is_no_policy() -> None:
    policy = Duo(np.zeros_like(STREAMS), 4, 20, 4)
    assert policy.window is None and policy.onset(0) == NEVER and policy.sync_point(Drive(policy, page=4).seq) == UNLIMITED


@pytest.mark.parametrize(("option", "value"), [("sinks", -1), ("local", 0), ("streaming", 2)])
def test_bad_values_are_named(option: str, value: int) -> None:
    with pytest.raises(InvalidInput, match=f"^duo:{option}={value}: must be"):
        DuoAttention(**{option: value})
