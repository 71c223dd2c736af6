"""The trainer of the knob: conflicts from templates, and a vector that the engine reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from redraft import LLM
from redraft_train.conflicts import conflicts, facts, halves
from tests.checkpoints import tiny_llama

torch = pytest.importorskip("torch")


def test_conflicts_contradict_facts_and_halves_share_none() -> None:
    known = facts()
    made = conflicts(known, 300)
    truth = {fact.stem: fact.answer for fact in known}
    assert len(made) == len(set(made)) == 300
    for one in made:
        assert one.prior == truth[one.about] != one.context
        assert one.context in one.prompt and one.prior not in one.prompt.replace(one.about, "").replace(
            one.about[0].upper() + one.about[1:], ""
        )
    first, second = halves(made)
    assert len(first) + len(second) == 300 and {one.about for one in first}.isdisjoint(one.about for one in second)
    assert conflicts(known, 300) == made != conflicts(known, 300, seed=1)
    assert len(conflicts(known[:1], 300)) == 0, "no other fact gives a wrong answer"


def test_a_vector_that_the_engine_reads(tmp_path: Path) -> None:
    from redraft_train import knob

    path = tiny_llama(tmp_path / "model", num_hidden_layers=4)
    model = knob.load(path)
    bytewise = (one._replace(context=one.context.strip(), prior=one.prior.strip()) for one in conflicts(facts(), 40))
    given = [one for one in bytewise if one.context[0] != one.prior[0]]  # the model has a token for each byte
    changes = knob.scan(model, given)
    assert len(changes) == 4 and 0 <= knob.chosen(changes) <= 2
    before, after = (knob.train(model, given, 1, steps=steps, rate=0.1) for steps in (1, 120))
    assert before.context > 0 > before.prior and float(after.u.norm()) == pytest.approx(1)
    off, on = knob.shares(model, None, given)["off"], knob.shares(model, after, given)
    assert on["off"] == off and on["context"] > on["prior"]
    knob.save(after, str(path), tmp_path / "knob", {"layer": 1})
    assert "| layer | 1 |" in (tmp_path / "knob" / "README.md").read_text()
    llm = LLM(str(path), dtype="float32", backend="numpy", threads=1, max_model_len=128)
    steered = [
        llm.generate("abc", temperature=0, max_tokens=8, steer=f"context-knob:path={tmp_path}/knob{way}") for way in ("", ",turn=-1")
    ]
    assert steered[0][0].outputs[0].token_ids != steered[1][0].outputs[0].token_ids


def test_cached_rows_give_the_logits_of_the_whole_prompt(tmp_path: Path) -> None:
    from redraft_train import knob

    model = knob.load(tiny_llama(tmp_path / "model"))
    given = conflicts(facts(), 5)
    (group,) = model.asked([one.prompt for one in given], given)
    rows = model.run(group)
    for row, one in zip(rows, given, strict=True):
        ids = torch.tensor([model.tokenizer(one.prompt, add_special_tokens=False).input_ids])
        with torch.no_grad():
            torch.testing.assert_close(row, model.model(ids).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_a_model_that_knows_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from redraft_train import knob

    path = tiny_llama(tmp_path / "model")
    monkeypatch.setattr("sys.argv", ["knob", str(path), "--out", str(tmp_path / "knob")])
    with pytest.raises(SystemExit, match="knows 0 of 85 facts: too few"):
        knob.main()
