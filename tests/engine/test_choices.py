"""Methods that requests choose by text: their number and their page formats are bounded. And the guarantees of choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from redraft import LLM, SamplingParams
from redraft.card import Guarantee
from redraft.core.sequence import Request
from redraft.engine import policies
from redraft.errors import UnknownMethod, Unsupported
from tests.checkpoints import tiny_llama
from tests.contracts.identity import drive, engine
from tests.engine.spelling import PROMPT
from tests.engine.test_plugins import SAMPLED


def windows(count: int) -> list[SamplingParams]:
    return [SAMPLED.but(keep=f"streaming-llm:sinks=2,recent={14 + i}") for i in range(count)]


def test_the_choice_unused_longest_goes() -> None:
    made = engine()
    made.opened.max_count = 4
    params = windows(7)
    first, second = (made.policies.check(one).keep for one in params[:2])
    for one in params[2:4]:
        made.policies.check(one)
    assert made.policies.check(params[0]).keep is first
    for one in params[4:]:
        made.policies.check(one)
        made.policies.check(params[0])
    assert made.opened.count == 4
    assert made.policies.check(params[0]).keep is first and made.policies.check(params[1]).keep is not second


def test_a_text_keeps_what_it_began_with() -> None:
    """More choices at once than may stay opened."""
    texts = []
    for most in (64, 1):
        made = engine(pool=60, layers=4)
        made.opened.max_count = most
        chosen: list[dict[str, Any]] = [{"keep": "streaming-llm:sinks=2,recent=14"}, {"keep": "scissorhands:budget=32,recent=4"}]
        chosen += [{"codec": "int4:block=32"}, {"read": "page-top-k:tokens=64,sinks=0"}, {"depth": "layer-skip:speedup=2"}, {}]
        requests = [Request(str(i), (PROMPT * 2)[i:], SAMPLED.but(**one)) for i, one in enumerate(chosen)]
        texts.append(drive(made, requests, [0, 0, 1, 1, 2, 3]).texts)
        made.policies.check(SAMPLED.but(keep="ada-kv"))
        assert made.opened.count == min(most, 6)
    assert texts[0] == texts[1]


def test_formats_stay_and_there_are_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "FORMATS", 2)
    made = engine(pool=60)
    made.opened.max_count = 1
    ways = [{"codec": "int4:block=32"}, {"codec": "int8"}, {"read": "page-top-k:logical=8"}]
    for way in ways[:2] * 2:  # they are opened again the second time
        made.policies.check(SAMPLED.but(**way))
    with pytest.raises(Unsupported, match=r"^read=page-top-k:logical=8: 2 page formats are in use") as refused:
        made.add(Request("r", PROMPT, SAMPLED.but(**ways[2])))
    assert "\n" not in str(refused.value) and not made.has_work and not made.outputs
    assert drive(made, [Request("r", PROMPT, SAMPLED.but(**ways[1]))], [0]).texts
    assert drive(made, [Request("r", PROMPT, SAMPLED.but(keep="streaming-llm:recent=8"))], [0]).texts, "which stores nothing of its own"
    assert drive(made, [Request("r", PROMPT, SAMPLED.but(read="page-top-k"))], [0]).texts, "whose options are the defaults"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tiny_llama(tmp_path_factory.mktemp("choices") / "llama")
    return LLM(str(path), dtype="float64", draft="token-recycling", draft_model=str(path), threads=1, cache_memory=1 << 22)


def test_the_guarantee_is_that_of_what_was_chosen(llm: LLM) -> None:
    def of(**changes: Any) -> Guarantee:
        return llm.guarantee_of(SamplingParams(**changes))

    assert of() is of(draft="none") is of(draft="draft-model", verify="coupled") is Guarantee.SAME_TEXT
    assert of(verify="rejection") is of(draft="draft-model", verify="recursive") is Guarantee.SAME_DISTRIBUTION
    assert of(verify="typical") > Guarantee.SAME_DISTRIBUTION
    assert of(verify="rejection", keep="streaming-llm") >= of(keep="streaming-llm") > Guarantee.SAME_DISTRIBUTION
    tossing = llm.sibling(draft="draft-model", verify="rejection")
    assert tossing.guarantee_of(SamplingParams()) is Guarantee.SAME_DISTRIBUTION
    assert tossing.guarantee_of(SamplingParams(verify="coupled")) is Guarantee.SAME_TEXT
    for wrong in ({"draft": "bogus"}, {"verify": ""}):
        with pytest.raises(UnknownMethod):
            of(**wrong)
    reported = llm.generate("a", SamplingParams(max_tokens=2, seed=1, verify="rejection"))[0]
    assert reported.guarantee == Guarantee.SAME_DISTRIBUTION.label


def test_second_models_side_by_side(llm: LLM, tmp_path: Path) -> None:
    """Drafters that share one second model, trimmed and whole, for both kinds of noise."""
    (tmp_path / "text").write_text("a b c d e f " * 9)
    trimmed = f"vocabtrim:keep=40,text={tmp_path / 'text'}"
    params = [SamplingParams(max_tokens=30, seed=i, ignore_eos=True, temperature=0.8) for i in range(7)]
    prompts = [f"once upon a time {i}" * (1 + i % 3) for i in range(7)]
    chosen: list[dict[str, Any]] = [{}, {"draft": "draft-model"}, {"draft": trimmed}, {"draft": "dyspec"}, {"draft": "union"}]
    chosen += [{"draft": "draft-model", "verify": "rejection"}, {"draft": "draft-model:length=2", "verify": "rejection"}]
    alone = [llm.generate(prompt, one)[0].outputs[0].token_ids for prompt, one in zip(prompts, params, strict=True)]
    mixed = [one.but(**way) for one, way in zip(params, chosen, strict=True)]
    found = llm.generate(prompts, mixed)
    for i, output in enumerate(found):
        assert output.error is None and not output.outputs[0].stats.fault, output.outputs[0].stats.fault
        assert output.outputs[0].token_ids == alone[i] or i > 4
        assert output.outputs[0].stats.accepted > 0 or i == 0
    for runner in [llm.runner, *llm.runner.draft_models.values()]:
        runner.memory.check()
        assert runner.memory.used() == 0
