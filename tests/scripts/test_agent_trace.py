"""The short form of scripts/prove agent-trace."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from redraft import LLM
from scripts import agent_trace
from scripts.agent_trace import Turn
from scripts.proofs import agent_trace as proof

TEXTS = ["".join(f"line {i} of text {name} says {i * i % 97}\n" for i in range(400)) for name in "abc"]


@pytest.fixture(scope="module")
def turns() -> list[Turn]:
    return agent_trace.trace(TEXTS, 14, 5000, seed=4)


def test_a_history_grows_is_changed_and_trimmed(turns: list[Turn]) -> None:
    assert {turn.kind for turn in turns} == set(proof.KINDS)
    for before, turn in pairwise(turns):
        old, new = before.blocks[:-1], turn.blocks[: len(before.blocks) - 1]
        changed = sum(a != b for a, b in zip(old, new, strict=False))
        assert changed == {"grow": 0, "edit": 1, "move": 2}.get(turn.kind, changed)
        assert (len(turn.blocks) > len(before.blocks)) == (turn.kind != "trim") and turn.results
    assert turns == agent_trace.trace(TEXTS, 14, 5000, seed=4) != agent_trace.trace(TEXTS, 14, 5000, seed=5)


def test_a_trace_is_read_as_it_was_written(turns: list[Turn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "trace.jsonl"
    text.write_text(TEXTS[0])
    command = ["agent_trace.py", "--texts", str(text), "--turns", "14", "--most", "5000", "--seed", "4", "--output", str(output)]
    monkeypatch.setattr("sys.argv", command)
    agent_trace.main()
    assert agent_trace.read(output) == agent_trace.trace(TEXTS[:1], 14, 5000, seed=4)


def test_the_prefix_cache_computes_what_changed_and_all_after_it() -> None:
    llm = LLM("embedded", dtype="float32", draft="none", threads=1)
    turns = agent_trace.trace(agent_trace.standard_library(), 5, 1500, seed=0)
    texts = [[token for block in ids for token in block] for ids in proof.encoded(llm, turns)]
    true = proof.exact(llm, texts)
    for before, ids, computed in zip(texts, texts[1:], true.computed[1:], strict=False):
        same = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))
        assert len(ids) - same <= computed < len(ids) - same + 32
    assert proof.divergence(true, true) == [0.0] * len(texts)
    llm.engine.memory.check()
    assert not llm.engine.memory.used()
