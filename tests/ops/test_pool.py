"""Zero and move of plain pages, backends against the reference, and the pages of each lane kind against the definition of a place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from redraft.core.sequence import Lanes, Space
from redraft.ops import reference, torch_ops
from redraft.ops.reference import Reference
from redraft.ops.torch_ops import TorchOps
from tests.contracts import plain
from tests.ops.tensors import Faced

BLOCKS = 5


def filled(ops: Reference | TorchOps | Faced) -> torch_ops.TorchPool | reference.ReferencePool:
    pool = ops.allocate(plain.tiny()[0], BLOCKS)
    pool.data.copy_(torch.randn(pool.data.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return pool


@pytest.mark.parametrize("backend", [TorchOps, Faced])
def test_a_backend_zeroes_and_moves_as_the_reference_does(backend: type[TorchOps] | type[Faced]) -> None:
    fast, slow = backend(torch.float64), Reference()
    pools = filled(fast), filled(slow)
    rng = np.random.default_rng(0)
    for ops, pool in zip((fast, slow), pools, strict=True):
        ops.zero(pool, [(Space(), 3), (Space(), 1)])
    for _ in range(20):
        src, dst = (rng.permutation(BLOCKS * 32)[:30].astype(np.int32) for _ in range(2))
        fast.move(pools[0], Space(), src, dst)
        slow.move(pools[1], Space(), src, dst)
        assert torch.equal(pools[0].data, pools[1].data)
    assert pools[0].data.abs().sum() > 0


def test_moves_are_gathered_before_they_are_scattered() -> None:
    for ops in (TorchOps(torch.float64), Faced(torch.float64), Reference()):
        pool = filled(ops)
        before = pool.data.clone()
        ops.move(pool, Space(), np.array([10, 11, 40], np.int32), np.array([11, 40, 10], np.int32))
        for src, dst in ((10, 11), (11, 40), (40, 10)):
            assert torch.equal(pool.data[dst // 32, :, :, :, dst % 32], before[src // 32, :, :, :, src % 32])


@pytest.mark.parametrize("backend", [Reference, TorchOps, Faced])
@pytest.mark.parametrize("kind", [Lanes.PER_LAYER, Lanes.PER_HEAD])
def test_pages_of_other_lanes_are_zeroed_and_moved(kind: Lanes, backend: type[Reference] | type[TorchOps] | type[Faced]) -> None:
    ops = backend(torch.float64)
    pool = filled(ops)
    before = pool.data.clone()
    layers, heads = pool.data.shape[1:3]
    ops.zero(pool, [(Space(kind), 3)])
    ops.move(pool, Space(kind), np.array([5 * 32 + 7], np.int32), np.array([2 * 32 + 1], np.int32))
    shape = (-1, heads, 2, 32, pool.data.shape[-1]) if kind is Lanes.PER_LAYER else (-1, 2, 32, pool.data.shape[-1])
    flat, old = pool.data.view(shape), before.view(shape)
    assert flat[3].abs().sum() == 0 and torch.equal(flat[2][..., 1, :], old[5][..., 7, :])
    assert len(flat) == BLOCKS * layers * (heads if kind is Lanes.PER_HEAD else 1)
    changed = (flat != old).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [2, 3]
