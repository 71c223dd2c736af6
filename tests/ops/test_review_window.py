"""A sliding window over trees in which the deepest node is not the last one."""

from __future__ import annotations

import pytest
import torch

from redraft.core.batch import Batch
from redraft.core.plan import Work
from redraft.core.taps import Taps
from redraft.core.testing import sequence
from redraft.core.tree import TokenTree
from tests.contracts.identity import engine
from tests.contracts.plain import VOCAB


def _logits(backend: str, window: int) -> torch.Tensor:
    """Six pending tokens (root at position 5) and nodes at positions 6, 7, 8 and, last, 6 again."""
    made, seq = engine(backend=backend, window=window), sequence(range(6))
    tree = TokenTree.build([1, 2, 3, 4], [-1, 0, 1, -1], vocab=VOCAB, rows=4, depth=3)
    made.memory.open(seq)
    pages = made.memory.reserve([Work(seq, 6)], [tree])
    logits = made.runner.forward(Batch.pack([Work(seq, 6)], [tree], pages), Taps(logits=True)).logits
    assert logits is not None
    return torch.as_tensor(logits)


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("window", [6, 7, 8, 9])
def test_a_window_counts_from_the_deepest_node(window: int, backend: str) -> None:
    torch.testing.assert_close(_logits(backend, window), _logits("reference", window), rtol=0, atol=1e-10)
