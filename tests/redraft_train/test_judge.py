"""The trainer of the judge: labels from texts that join again, and a file that the engine reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from redraft import LLM
from redraft.errors import InvalidInput
from redraft_train import judge
from tests.redraft_train.conftest import LINES


def test_texts_join_where_a_run_of_both_begins_in_time() -> None:
    greedy = list(range(12))
    assert judge.joins([50, 51, 2, 3, 4, 5, 60, 61, 62, 63, 64, 65], greedy)
    assert judge.joins([50] * 8 + [0, 1, 2, 3], greedy)
    assert not judge.joins([50, 51, 2, 3, 4, 60, 61, 62, 63, 64, 65, 66], greedy), "three tokens are no run"
    assert not judge.joins([50] * 9 + [0, 1, 2, 3], greedy), "too late"


def test_it_learns_what_states_tell_and_the_engine_reads_it(llm: LLM, tmp_path: Path) -> None:
    draft = LLM("embedded-draft", draft="none", dtype="float32", cache_memory=1 << 26)
    found = judge.examples(llm, draft, [llm.tokenizer.encode(line) for line in LINES[:4]], 24)
    fitted = judge.fit(found)
    chances = fitted.chances(found.states)
    assert chances[found.right].mean() > 0.6 > 0.4 > chances[~found.right].mean()
    shuffled = judge.Examples(found.states, np.roll(found.right, 7), found.text)
    assert ((chances > 0.5) == found.right).mean() > ((chances > 0.5) == shuffled.right).mean() + 0.2
    judge.save(fitted, llm, tmp_path, judge.report(fitted, found))
    assert "| t = 0.5 | " in (tmp_path / "README.md").read_text()
    opened = llm.sibling(verify=f"judge:path={tmp_path}").engine.verifier.own
    np.testing.assert_allclose(opened.w, fitted.w, rtol=1e-5)


def test_labels_of_one_kind_are_refused(llm: LLM) -> None:
    with pytest.raises(InvalidInput, match="0 forced tokens, 0 right"):
        judge.examples(llm, llm, [llm.tokenizer.encode(LINES[0])], 4)
