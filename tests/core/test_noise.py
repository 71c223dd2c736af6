"""Noise: a fixed function, uniform, and without visible ties between its arguments."""

from __future__ import annotations

import numpy as np
import pytest

from redraft.core.noise import CHUNK, Stream, draw, gumbel, key, mix, sample_seed, uniform
from tests.contracts.algebra import LEAST_P, chi_square_p

IDS = np.arange(20_000)


def test_is_pinned_for_ever():
    assert [hex(mix(1, 2)), hex(mix(1, 2, 3)), hex(key(7, Stream.TARGET, 5))] == PINNED_KEYS
    np.testing.assert_allclose(uniform(key(7, Stream.TARGET, 5), np.arange(3)), PINNED_UNIFORM, rtol=1e-12)


PINNED_KEYS = ["0x71bb54d8d101b5b9", "0x80bc064c8069d620", "0xe9a05a4d6ef14d70"]
PINNED_UNIFORM = [0.20741773039881656, 0.6756795434243095, 0.8179468210572354]


def bins(u, n=50):
    return np.bincount((u * n).astype(int), minlength=n)


@pytest.mark.parametrize(
    "sample",
    [
        lambda: uniform(key(3, Stream.TARGET, 9), IDS),
        lambda: np.concatenate([uniform(key(3, Stream.TARGET, at), IDS[:1]) for at in range(20_000)]),
        lambda: np.concatenate([uniform(key(seed, Stream.TARGET, 9), IDS[5:6]) for seed in range(20_000)]),
        lambda: np.concatenate([uniform(key(sample_seed(1, i), Stream.TARGET, 9), IDS[5:6]) for i in range(20_000)]),
    ],
    ids=["ids", "positions", "seeds", "samples of n"],
)
def test_uniform_over_every_argument(sample):
    u = sample()
    assert (u > 0).all() and (u < 1).all()
    assert chi_square_p(bins(u), np.full(50, len(u) / 50)) >= LEAST_P


@pytest.mark.parametrize(
    "other",
    [
        lambda: uniform(key(3, Stream.TARGET, 10), IDS),
        lambda: uniform(key(4, Stream.TARGET, 9), IDS),
        lambda: uniform(key(3, Stream.DRAFT, 9), IDS),
        lambda: uniform(key(sample_seed(3, 1), Stream.TARGET, 9), IDS),
        lambda: uniform(key(3, Stream.TARGET, 9), IDS + 1),
    ],
    ids=["position", "seed", "stream", "sample", "id"],
)
def test_pairs_are_independent(other):
    pairs = np.floor(uniform(key(3, Stream.TARGET, 9), IDS) * 7) * 7 + np.floor(other() * 7)
    counts = np.bincount(pairs.astype(int), minlength=49)
    assert chi_square_p(counts, np.full(49, len(IDS) / 49)) >= LEAST_P


def test_a_word_cannot_pass_for_another():
    keys = {mix(seed, a, b) for seed in range(20) for a in range(20) for b in range(20)}
    assert len(keys) == 8000
    assert mix(1, 2, 3) != mix(1, 3, 2)


def test_sample_seed():
    assert sample_seed(42, 0) == 42
    assert len({sample_seed(seed, i) for seed in range(30) for i in range(30)}) == 900, "no sample of one request is that of another"


def test_each_id_alone_as_among_all():
    k = key(5, Stream.TARGET, 77)
    everything = gumbel(k, IDS)
    some = np.flatnonzero(IDS % 7 == 3)
    np.testing.assert_array_equal(everything[some], gumbel(k, some))
    assert all(everything[i] == gumbel(k, np.asarray([i]))[0] for i in range(100))


def test_gumbel_argmax_is_a_sample():
    p = np.asarray([0.5, 0.25, 0.2, 0.05])
    drawn = [int(np.argmax(np.log(p) + gumbel(key(seed, Stream.TARGET, 3), np.arange(4)))) for seed in range(20_000)]
    assert chi_square_p(np.bincount(drawn, minlength=4), p * 20_000) >= LEAST_P


def test_a_draw_is_the_first_of_the_largest_sums():
    ids = np.arange(2 * CHUNK + 5)
    for k in range(20):
        values = np.random.default_rng(k).normal(size=len(ids))
        assert draw(k, ids, values) == (values + gumbel(k, ids)).argmax()
    assert draw(9, np.zeros(2 * CHUNK, np.int64), np.zeros(2 * CHUNK)) == 0, "equal ids have equal noise"


def test_never_infinite():
    """The key for which the hash at id 0 has all bits set, found by inverting the hash."""

    def unshift(x, by):
        out = x
        for _ in range(64 // by + 1):
            out = x ^ (out >> by)
        return out

    x = (1 << 64) - 1
    for _ in range(2):
        x = unshift(x, 31)
        x = unshift(x * pow(0x94D049BB133111EB, -1, 1 << 64) % (1 << 64), 27)
        x = unshift(x * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) % (1 << 64), 30)
    assert uniform(x, np.zeros(1, np.int64))[0] > 0.999999, "the inverse is right"
    assert uniform(x, np.zeros(1, np.int64))[0] < 1
    assert np.isfinite(gumbel(x, np.zeros(1, np.int64))).all()
