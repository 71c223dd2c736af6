"""Scores of heads: an induction head that is made by hand scores 1, the order is a function of the scores, and files are checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from redraft import LLM
from redraft.core.spec import Attention
from redraft.errors import CheckpointError, InvalidInput
from redraft.kv.eviction import retrieval_heads
from redraft.kv.eviction.retrieval_heads import HeadProfile, head_scores, opened

BLOCK, COPIES = 6, 4


def test_heads_that_are_made_by_hand() -> None:
    """Head 0 looks for the same token, head 1 for the token after it; heads 2 and 3 of the other group look nowhere."""
    ids, n = np.tile(np.arange(BLOCK), COPIES), BLOCK * COPIES
    same = 40 * np.eye(BLOCK, dtype=np.float32)
    keys = np.zeros((n, 2, BLOCK), np.float32)
    keys[:, 0], queries = same[ids], np.zeros((BLOCK, 4, BLOCK), np.float32)
    queries[:, 0], queries[:, 1] = same, np.roll(same, 1, 1)
    echo, induction = head_scores(queries, keys, Attention(4, 2, BLOCK))
    assert echo[0] == pytest.approx(3 / 4, abs=0.01)  # the fourth is the row's own token
    assert induction[0] == pytest.approx(1, abs=0.2) and induction[0] > 0.8
    assert echo[1] < 0.2 and induction[1] < 0.2


def profile(echo: list[float], induction: list[float]) -> HeadProfile:
    return HeadProfile(np.array([echo], np.float32), np.array([induction], np.float32), "hash", 1)


def test_shares_of_heads() -> None:
    found = profile([0.9, 0.1, 0.1, 0.1], [0.0, 0.2, 0.8, 0.2])
    assert found.retrieving(0.01, 0.5).tolist() == [[True, True, True, False]]  # the lower of equal heads
    assert not found.retrieving(0, 0).any() and found.retrieving(1, 0).all()
    assert found.weakest(0.5).tolist() == [[False, True, False, True]] and not found.weakest(0).any() and found.weakest(1).all()


def test_a_calibration_is_a_function_of_the_model_and_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = LLM("embedded", draft="none").runner
    made, again = (retrieval_heads.calibrate(runner, block=16) for _ in range(2))
    shape = len(runner.spec.attention), runner.spec.kv_heads
    assert made.echo.shape == made.induction.shape == shape and ((made.echo >= 0) & (made.induction <= 1)).all()
    assert np.array_equal(made.echo, again.echo) and np.array_equal(made.induction, again.induction)
    file = made.save(tmp_path / "own.safetensors")
    assert np.array_equal(opened(runner, file, "razor").induction, made.induction)
    with pytest.raises(InvalidInput, match=r"^duo: no profile .*; make one with: redraft calibrate .* --method razor$"):
        opened(runner, tmp_path / "none.safetensors", "duo")
    with pytest.raises(InvalidInput, match="was made for the model with hash hash"):
        opened(runner, profile([0.0], [0.0]).save(tmp_path / "other.safetensors"), "razor")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="not a complete file of razor"):
        opened(runner, file, "razor")
