"""A text under a grammar has the tokens that it has alone without drafts: with every drafter, under every policy, in a batch, in a small
pool, sampled n times. Whatever finishes is in the language."""

from __future__ import annotations

import json
import re
from functools import cache

import jsonschema
import pytest

from redraft import registry
from redraft.card import Guarantee
from redraft.config import SamplingParams
from redraft.core.plan import Budget, StepResult
from redraft.core.sequence import Sequence
from redraft.core.tree import TokenTree
from redraft.errors import RedraftError
from redraft.llm import LLM

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "kind": {"enum": ["first", "second"]},
    },
    "required": ["name", "sizes", "kind"],
    "additionalProperties": False,
}
GRAMMARS = [
    {"json": SCHEMA},
    {"regex": r"[a-d]{3,9}( = [0-9]+)?;"},
    {"choice": ["return None", "return self", "raise ValueError()"]},
    {"grammar": 'start: "(" start? ")" | /[a-z]{1,4}/'},
]
PROMPTS = ["def f(x):\n", "import json\n\nprint(", 'data = {"name": "a", "sizes": [1, 2], "kind": "first"}\n']
DRAFTERS = [name for name in registry.METHODS["draft"] if name != "none"]
POLICIES = [{}, {"keep": "streaming-llm:sinks=2,recent=14"}, {"codec": "int4:block=32"}, {"depth": "layer-skip:speedup=2"}]


@cache
def model() -> LLM:
    return LLM("embedded", draft="none", cache_memory=1 << 27, threads=1)


def requests(**policies: str) -> list[SamplingParams]:
    ways = [{"temperature": 0}, {"temperature": 0.9}, {"temperature": 1.4, "top_p": 0.9, "n": 2, "repetition_penalty": 1.1}]
    return [
        SamplingParams(seed=7 + i, max_tokens=48, structured_outputs=grammar, **way, **policies)
        for i, (grammar, way) in enumerate((grammar, way) for grammar in GRAMMARS for way in ways)
    ]


def texts(llm: LLM, params: list[SamplingParams]) -> list[list[list[int]]]:
    outputs = llm.generate([PROMPTS[i % len(PROMPTS)] for i in range(len(params))], params)
    for output, one in zip(outputs, params, strict=True):
        assert output.error is None, output.error
        for text in output.outputs:
            assert text.stats.fault == "", text.stats.fault
            assert text.finish_reason != "stop" or fits(text.text, one), (text.text, one.structured_outputs)
    return [[text.token_ids for text in output.outputs] for output in outputs]


def fits(text: str, params: SamplingParams) -> bool:
    assert params.structured_outputs is not None
    kind, form = params.structured_outputs
    if kind == "json":
        return jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(text))
    if kind == "choice":
        return text in json.loads(form)
    return re.fullmatch(form if kind == "regex" else r"\(*[a-z]{0,4}\)*", text) is not None


@cache
def alone(policy: int) -> list[list[list[int]]]:
    """Each text by itself, one token a step."""
    found = []
    for i, params in enumerate(requests(**POLICIES[policy])):
        (output,) = model().generate([PROMPTS[i % len(PROMPTS)]], params)
        found.append([text.token_ids for text in output.outputs])
    return found


def opened(draft: str) -> LLM:
    try:
        return model().sibling(draft=draft)
    except RedraftError as error:
        pytest.skip(f"{draft}: {error}")


def test_texts_finish_and_differ() -> None:
    found = alone(0)
    params = requests()
    assert texts(model(), params) == found, "in a batch"
    assert len({tuple(tokens) for one in found for tokens in one}) > 12


@pytest.mark.parametrize("draft", DRAFTERS)
def test_the_same_text_with_every_drafter(draft: str) -> None:
    llm = opened(draft)
    if llm.guarantee > Guarantee.SAME_TEXT:
        pytest.skip(f"{draft} does not promise the same text")
    assert texts(llm, requests()) == alone(0)


@pytest.mark.parametrize("policy", range(1, len(POLICIES)), ids=lambda i: next(iter(POLICIES[i].values())).partition(":")[0])
@pytest.mark.parametrize("draft", ["auto", "token-recycling"])
def test_the_same_text_under_policies(draft: str, policy: int) -> None:
    assert texts(opened(draft), requests(**POLICIES[policy])) == alone(policy)


def test_a_preempted_text_continues_where_it_was() -> None:
    long = {"regex": "[a-z]( [a-z]){70,80}"}
    params = [SamplingParams(seed=i, temperature=1, max_tokens=96, structured_outputs=long) for i in range(6)]
    single = [texts(model(), [one])[0] for one in params]
    crowded = LLM("embedded", draft="auto", cache_memory=8 << 16, max_model_len=128, threads=1, prefix_sharing=False)
    found = crowded.generate(PROMPTS[:1] * len(params), params)
    assert [[text.token_ids for text in output.outputs] for output in found] == single
    assert crowded.engine.preemptions > 0


WITHOUT_A_FILE = {"judge": "judge:t=0"}


@pytest.mark.parametrize("verify", [WITHOUT_A_FILE.get(name, name) for name in registry.METHODS["verify"] if name != "coupled"])
def test_what_other_verifiers_let_through_is_in_the_language(verify: str) -> None:
    """They promise less than the same text."""
    texts(LLM("embedded", draft="token-recycling", verify=verify, cache_memory=1 << 26, threads=1), requests())


def test_forced_tokens_are_drafted_and_named() -> None:
    params = SamplingParams(temperature=0, max_tokens=60, provenance=True, structured_outputs={"json": SCHEMA})
    (output,) = opened("auto").generate(PROMPTS[0], params)
    checked, kept = output.outputs[0].stats.by_drafter["grammar"]
    assert 0 < kept <= checked
    (off,) = model().generate(PROMPTS[0], params)
    assert off.outputs[0].stats.drafted == 0, "without a drafter nothing is drafted"


def test_a_drafter_learns_from_what_it_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = opened("union:parts=suffix+ngram")
    drafter, seen = llm.engine.drafter.own.drafter, []
    observe = drafter.observe

    def observed(result: StepResult) -> None:
        seen.extend((result.trees[s], *result.own(s), result.accepted[s]) for s in range(len(result.work)))
        observe(result)

    monkeypatch.setattr(drafter, "observe", observed)
    texts(llm, requests())
    changed = [(own, path, accepted) for tree, own, path, accepted in seen if own is not tree]
    assert changed and any(path for _, path, _ in changed)
    for own, path, accepted in changed:
        assert own.origins is None or max(own.origins.tolist(), default=0) < 2, "nodes of the constraint are not the drafter's"
        assert tuple(own.tokens[list(path)].tolist()) == accepted.tokens[: len(path)]


def test_forced_tokens_are_drafted_while_the_drafter_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = opened("suffix")
    guard, asked = llm.engine.drafter.own, []
    propose = guard.propose

    def proposed(seqs: list[Sequence], budgets: list[Budget]) -> list[TokenTree]:
        asked.extend(budget for seq, budget in zip(seqs, budgets, strict=True) if seq.constrained and seq.generated > 2)
        for seq in seqs:
            seq.rest = 1000 if seq.constrained else 0
        return propose(seqs, budgets)

    monkeypatch.setattr(guard, "propose", proposed)
    params = [
        SamplingParams(temperature=0, max_tokens=40, structured_outputs={"json": SCHEMA}),
        SamplingParams(temperature=0, max_tokens=60),
    ]
    constrained, _ = llm.generate(PROMPTS[:2], params)
    checked, kept = constrained.outputs[0].stats.by_drafter["grammar"]
    assert 2 < kept <= checked and set(constrained.outputs[0].stats.by_drafter) == {"grammar"}
    assert asked and set(asked) == {Budget(0, 0)}
