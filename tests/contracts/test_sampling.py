"""A text has the same tokens with samplers and controls of every kind, whatever drafts, batch, pool or verifier it has."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.sequence import FinishReason, Request
from redraft.llm import LLM
from redraft.sample.controls.control import Stage
from tests.sample.controls.toys import TOYS, Toy

SAMPLERS: dict[str, dict[str, Any]] = {
    "dry": {"dry_multiplier": 1.5, "dry_allowed_length": 1, "temperature": 0},
    "dry, sampled": {"dry_multiplier": 0.8, "dry_sequence_breakers": ("\n", "("), "dry_penalty_last_n": 40, "temperature": 0.6},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.08, "temperature": 0.8},
    "top-n-sigma": {"top_n_sigma": 1.0, "temperature": 1.5},
    "dynamic temperature": {"dynatemp_range": 0.6, "dynatemp_exponent": 0.5, "min_p": 0.02},
    "mirostat": {"mirostat": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.4, "temperature": 1.2},
    "mirostat, many": {"mirostat": 2, "mirostat_tau": 3.0, "top_k": 40, "xtc_probability": 0.2, "dry_multiplier": 1.0, "n": 2},
}
BITING = {"rpg": "decay=0.01,start=2"}  # options with which a control changes a short text; others have their defaults
CONTROLS: dict[str, dict[str, Any]] = {
    f"{name}, {temperature}": {
        "control": f"{name}:{BITING.get(name, '')}".rstrip(":"),
        "temperature": temperature,
        **({"n": 2} if temperature else {"max_tokens": 56}),
    }
    for name in registry.METHODS["control"]
    for temperature in (0, 0.8)
}
CONTROLS |= {toy.stage.value: {"control": toy, "temperature": 1.5, "n": 2} for toy in TOYS}
CONTROLS["all stages"] = {"control": TOYS, "temperature": 1.5, "xtc_probability": 0.3}
WAYS = SAMPLERS | CONTROLS
OFF = {"dry_multiplier": 0, "xtc_probability": 0, "top_n_sigma": 0, "dynatemp_range": 0, "mirostat": 0, "control": None}
PROMPTS = ["def f(x):\n", "import json\n\nprint(", "x = [1, 2, 1, 2, 1, 2, 1, 2, 1, 2, "]
DRAFTERS = ["token-recycling", "suffix", "draft-model", "rsd-s", "union:parts=copyspec+token-recycling"]


COPIES = "def test_f():\n" + "    assert f(1) == 1\n" * 6  # more of them follow


def prompt(i: int) -> str:
    """Of a way by its number."""
    return PROMPTS[i % len(PROMPTS)] if i < len(SAMPLERS) else COPIES


def requests(length: int = 40) -> list[SamplingParams]:
    return [SamplingParams(**{"seed": 7 + i, "max_tokens": length, **one}) for i, one in enumerate(WAYS.values())]


@cache
def model() -> LLM:
    return LLM("embedded", draft="none", cache_memory=1 << 27, threads=1)


def texts(llm: LLM, params: list[SamplingParams]) -> list[list[list[int]]]:
    outputs = llm.generate([prompt(i) for i in range(len(params))], params)
    for output in outputs:
        assert output.error is None, output.error
        assert all(text.stats.fault == "" for text in output.outputs)
    return [[text.token_ids for text in output.outputs] for output in outputs]


@cache
def alone() -> list[list[list[int]]]:
    found = []
    for i, params in enumerate(requests()):
        (output,) = model().generate([prompt(i)], params)
        found.append([text.token_ids for text in output.outputs])
    return found


def test_each_changes_a_text() -> None:
    found = alone()
    assert texts(model(), requests()) == found, "in a batch"
    plain = texts(model(), [params.but(**OFF) for params in requests()])
    changed = {name.removesuffix(", 0.8").removesuffix(", 0") for name, a, b in zip(WAYS, found, plain, strict=True) if a != b}
    assert changed == {name.removesuffix(", 0.8").removesuffix(", 0") for name in WAYS}


@pytest.mark.parametrize("draft", DRAFTERS)
def test_the_same_text_with_drafts(draft: str) -> None:
    llm = model().sibling(draft=draft)
    assert texts(llm, requests()) == alone()
    assert llm.engine.memory.used() == 0


@pytest.mark.parametrize("draft", ["none", "token-recycling"])
def test_the_same_text_after_preemption(draft: str) -> None:
    crowded = LLM("embedded", draft=draft, cache_memory=10 << 16, max_model_len=128, threads=1, prefix_sharing=False)
    assert texts(crowded, requests()) == alone()
    assert crowded.engine.preemptions > 0


@pytest.mark.parametrize("verify", [name for name in registry.METHODS["verify"] if name not in ("coupled", "judge")])
def test_texts_under_other_verifiers(verify: str) -> None:
    """They promise less than the same text. Some ask a check about the whole vocabulary, so a quick one stands for others."""
    llm = LLM("embedded", draft="rsd-s" if verify == "recursive" else "token-recycling", verify=verify, cache_memory=1 << 26, threads=1)
    assert all(texts(llm, [params for name, params in zip(WAYS, requests(16), strict=True) if ", 0.8" not in name]))
    llm.engine.memory.check()


@pytest.mark.parametrize("name", CONTROLS)
def test_an_abort_or_a_fault_leaves_nothing_and_changes_no_other_text(name: str) -> None:
    engine, tokenizer = model().sibling(draft="token-recycling").engine, model().tokenizer
    number = [*WAYS].index(name)
    others = {str(i): params for i, params in enumerate(requests()) if i in (number, 0)}
    given = [Request(one, tokenizer.encode(prompt(int(one))), params) for one, params in others.items()]
    given.append(Request("aborted", list(given[0].prompt), requests()[number]))
    given.append(Request("fails", list(given[0].prompt), SamplingParams(control=Toy(Stage.CHECK, fails=True), temperature=1, seed=1)))
    for request in given:
        engine.add(request)
    found: dict[tuple[str, int], list[int]] = {}
    ended: dict[str, Any] = {}
    steps = 0
    while engine.has_work:
        for event in engine.step():
            found.setdefault((event.request.id, event.index), []).extend(event.tokens)
            ended[event.request.id] = event.error or event.reason
        steps += 1
        if steps == 5:
            engine.abort("aborted")
    for one in others:
        assert [found[one, i] for i in range(others[one].n)] == alone()[int(one)]
    assert str(ended["fails"]) == "control: it raised KeyError: 'a fault'"
    assert ended["0"] is FinishReason.LENGTH and len(found["aborted", 0]) < 40
    engine.memory.check()
    assert engine.memory.used() == 0 and not len(engine.outputs)
