"""Texts that list the same pages have the bits of texts with copies of them. The short form of scripts/prove shared-prefix."""

from __future__ import annotations

import numpy as np
import pytest

from redraft import LLM
from redraft.kv.store import Store
from scripts.proofs import shared_prefix


@pytest.fixture(scope="module", params=["native", "numpy"])
def llm(request: pytest.FixtureRequest) -> LLM:
    return shared_prefix.loaded("embedded", batch=9, prefix=96, own=20, backend=request.param)


@pytest.mark.parametrize(("prefix", "own"), [(32, 0), (96, 20)])
def test_shared_and_private_pages_give_the_same_bits(llm: LLM, prefix: int, own: int) -> None:
    found = shared_prefix.compared(llm, shared_prefix.text(llm, prefix), own, batch=9, rounds=1)
    assert found.differing == 0 and found.pages == 9 * prefix // 32


def test_copies_in_another_order_are_found(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    move = Store.move
    monkeypatch.setattr(Store, "move", lambda store, moves: move(store, [one._replace(src=np.roll(one.src, 1)) for one in moves]))
    assert shared_prefix.compared(llm, shared_prefix.text(llm, 96), 20, batch=9, rounds=1).differing
