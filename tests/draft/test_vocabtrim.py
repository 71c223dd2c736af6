from __future__ import annotations

import re
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from redraft import LLM, SamplingParams, registry
from redraft.core.plan import Work
from redraft.core.sequence import Request
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.draft.second import SecondModelDrafter
from redraft.draft.vocabtrim import Trimmed, VocabTrim
from redraft.engine.engine import Engine
from redraft.errors import InvalidInput, UnknownMethod, Unsupported
from redraft.models.draft_model import load_draft_model
from redraft.ops.backend import Linear
from tests.contracts.identity import SAMPLING, drive, engine, expected, opened_by_name, prompts
from tests.contracts.plain import VOCAB

TEXT = "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n    print(add(i, 1))\n"
PROMPTS = ["def sub(a, b):\n", "for i in range(3):\n    print("]
GREEDY, SAMPLED = (SamplingParams(temperature=t, max_tokens=10, seed=7) for t in (0, 0.8))
CROWD = (0, 1, 0, 1, 0, 0)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("embedded", draft="draft-model", cache_memory=1 << 25)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sample.py"
    path.write_text(TEXT, encoding="utf-8")
    return path


def trimmed(llm: LLM, text: Path, keep: int, draft: str = "draft-model") -> tuple[LLM, Trimmed]:
    made = llm.sibling(draft=f"vocabtrim:draft=({draft}),keep={keep},text={text}")
    opened: Any = made.engine.drafter.own.drafter
    return made, opened


def grower(opened: Trimmed) -> SecondModelDrafter:
    (inner,) = opened.parts
    assert isinstance(inner, SecondModelDrafter)
    return inner


def run(llm: LLM, params: SamplingParams) -> tuple[list[list[int]], int, int]:
    """Texts, number of drafted nodes, number of accepted nodes."""
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS, params)]
    return [one.token_ids for one in outputs], sum(one.stats.drafted for one in outputs), sum(one.stats.accepted for one in outputs)


def drafted(opened: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[TokenTree]:
    """Records the trees that the drafter proposes from now on."""
    trees: list[TokenTree] = []
    propose = opened.propose

    def spy(*args: Any) -> list[TokenTree]:
        found: list[TokenTree] = propose(*args)
        trees.extend(found)
        return found

    monkeypatch.setattr(opened, "propose", spy)
    return iter(trees)


# ---- what is kept


def test_what_no_text_may_lack_stays_too(llm: LLM, text: Path) -> None:
    _, opened = trimmed(llm, text, 1)
    counts = np.bincount(llm.tokenizer.encode(TEXT, special=False))
    forced = {token for one in "\n0123456789" for token in llm.tokenizer.encode(one, special=False)}
    forced |= {*llm.eos, *llm.tokenizer.special_ids}
    assert set(opened.keep.tolist()) == forced | {int(counts.argmax())}
    assert len(forced) > 10


# ---- what changes, and what does not


@pytest.mark.parametrize("draft", ["draft-model:length=4", "rsd-s:width=3"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_text_is_the_plain_one_and_drafts_are_of_kept_tokens(
    llm: LLM, text: Path, params: SamplingParams, draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _, _ = run(llm.sibling(draft="none"), params)
    made, opened = trimmed(llm, text, 30, draft)
    trees = drafted(opened, monkeypatch)
    texts, nodes, accepted = run(made, params)
    assert texts == plain
    assert nodes > accepted > 0
    proposed = {int(token) for tree in trees for token in tree.tokens}
    assert proposed
    assert proposed <= set(opened.keep.tolist())
    whole = {int(token) for tree in drafts_of(llm, draft, params, monkeypatch) for token in tree.tokens}
    assert whole - set(opened.keep.tolist()), "or nothing was trimmed that would have been drafted"


def drafts_of(llm: LLM, draft: str, params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> Iterator[TokenTree]:
    made = llm.sibling(draft=draft)
    trees = drafted(made.engine.drafter.own.drafter, monkeypatch)
    run(made, params)
    return trees


def test_the_whole_vocabulary_is_no_change_and_others_see_none(llm: LLM, text: Path) -> None:
    whole = run(llm, SAMPLED)
    second = load_draft_model(llm.runner, None)
    head = second.weights.head
    small, opened = trimmed(llm, text, 30)
    assert grower(opened).runner is not second
    assert grower(opened).runner.weights.head.outs == len(opened.keep) < 60
    assert grower(opened).memory.paged.table is second.memory.paged.table
    assert run(small, SAMPLED)[1:] != whole[1:]
    assert second.weights.head is head
    assert run(llm, SAMPLED) == whole, "the sibling that shares the second model"
    full, opened = trimmed(llm, text, 1 << 20)
    assert grower(opened).runner is second
    assert run(full, SAMPLED) == whole
    assert opened.coverage == 1


def logits(one: SecondModelDrafter, tokens: list[int]) -> Any:
    """The drafter's logits f64[V] after a text."""
    seq = sequence(tokens, temperature=1)
    one.memory.open(seq)
    found = one._forward([Work(seq, len(tokens))], [EMPTY])
    one.memory.free(seq)
    assert found is not None
    return found[0][0]


def test_kept_tokens_have_the_logits_that_they_had(llm: LLM, text: Path) -> None:
    """Also if the head is stored in a layout of the backend, as on most CPUs."""
    tokens = llm.tokenizer.encode(PROMPTS[0])
    _, opened = trimmed(llm, text, 30)
    plain: Any = llm.engine.drafter.own.drafter
    whole, small = logits(plain, tokens), logits(grower(opened), tokens)
    np.testing.assert_allclose(small[opened.keep], whole[opened.keep], rtol=0, atol=1e-4)
    assert np.ptp(whole) > 5
    assert (np.delete(small, opened.keep) == -np.inf).all()
    assert len(small) == len(whole) == llm.runner.spec.vocab


def test_coverage_is_the_share_of_kept_tokens_in_what_was_written(llm: LLM, text: Path) -> None:
    made, opened = trimmed(llm, text, 30)
    assert opened.coverage == 1, "nothing was written yet"
    texts, _, _ = run(made, SAMPLED)
    written = [token for one in texts for token in one]
    assert opened.coverage == np.isin(written, opened.keep).mean()
    assert 0 < opened.coverage < 1


def test_a_model_that_is_only_looked_at_is_left_alone(llm: LLM, text: Path) -> None:
    second = load_draft_model(llm.runner, None)
    meta = copy(second)
    meta.weights = replace(second.weights, head=Linear(torch.empty(second.weights.head.outs, second.spec.hidden, device="meta")))
    one = SecondModelDrafter(grower(trimmed(llm, text, 30)[1]).method, meta, llm.engine.sampler)
    one.trim(np.arange(5))
    assert one.runner is meta


# ---- the engine: the tiny model in float64 with half of its vocabulary kept


def tiny(draft: str = "rsd-s", verify: str = "coupled", pool: int = 40) -> tuple[Engine, Trimmed]:
    plain = engine(pool=pool, chunk=24, verify=verify)
    second = cast(Any, opened_by_name(draft, plain.runner, plain.sampler))
    opened = Trimmed(second, np.arange(0, VOCAB, 2), VOCAB)
    return Engine(plain.runner, plain.scheduler, opened, plain.verifier.own, plain.sampler, max_model_len=128), opened


@pytest.mark.parametrize("pool", [40, 5])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_text_is_the_definitions(sampling: str, pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = {str(i): list(expected(None, prompt, sampling, 100 + i)) for i, prompt in enumerate(prompts())}
    made, opened = tiny(pool=pool)
    inner, steps = grower(opened), []
    observe = inner.observe
    monkeypatch.setattr(inner, "observe", lambda result: (steps.append(len(result.work)), observe(result)))
    requests = [Request(str(i), list(prompt), SAMPLING[sampling].but(seed=100 + i)) for i, prompt in enumerate(prompts())]
    seen = drive(made, requests, CROWD)
    assert seen.texts == truth
    assert len(steps) > 10, "what was accepted is reported to the second model"
    assert seen.accepted > 10
    assert bool(seen.preempted) == (pool == 5)
    table = inner.memory.paged.table
    table.check()
    assert table.used() == 0
    assert opened.coverage == sum(token % 2 == 0 for one in truth.values() for token in one) / sum(map(len, truth.values()))


def test_the_distribution_that_a_coin_reverses_is_of_kept_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made, opened = tiny("draft-model", "rejection")
    trees = drafted(opened, monkeypatch)
    drive(made, [Request("0", list(prompts()[0]), SAMPLING["sampled"].but(seed=100))], [0])
    distributions = [tree.distributions.probs([0])[0] for tree in trees if tree.distributions is not None]
    assert len(distributions) > 5
    assert all(
        abs(distribution.sum() - 1) < 1e-12 and not distribution[1::2].any() and distribution[::2].all() for distribution in distributions
    )


def test_ids_that_the_second_model_lacks_are_not_drafted() -> None:
    one = grower(tiny()[1])  # the head has 12 rows already, like a checkpoint with a smaller vocabulary
    one.trim(np.array([0, 2, 23, 24, 30]))
    assert one.kept is not None
    assert one.kept.tolist() == [0, 2]
    assert one.runner.weights.head.outs == 2


# ---- what is refused


@pytest.mark.parametrize("draft", ["copyspec", "union:parts=copyspec+token-recycling", "none"])
def test_a_drafter_without_a_second_model_is_refused_by_name(llm: LLM, text: Path, draft: str) -> None:
    with pytest.raises(Unsupported, match=rf"^vocabtrim:draft=\({re.escape(draft)}\): this drafter has no second model"):
        trimmed(llm, text, 30, draft)


def test_options_are_checked_at_once(text: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^vocabtrim:keep=0: must be 1 or more$"):
        VocabTrim(keep=0, text=text)
    with pytest.raises(InvalidInput, match=r"^vocabtrim:text=none: must be a text file"):
        registry.create("draft", "vocabtrim:keep=9")
    with pytest.raises(UnknownMethod, match="no draft method 'draft-modell'"):
        VocabTrim(draft="draft-modell", text=text)
    with pytest.raises(InvalidInput, match="length"):
        VocabTrim(draft="draft-model:length=0", text=text)


def test_a_text_that_cannot_be_read(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^vocabtrim:text=.*none\.txt: cannot be read \(No such file"):
        trimmed(llm, tmp_path / "none.txt", 9)
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(InvalidInput, match=r"^vocabtrim:text=.*latin: cannot be read \(not UTF-8 text\)$"):
        trimmed(llm, tmp_path / "latin", 9)
