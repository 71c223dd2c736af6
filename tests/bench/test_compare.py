"""Fair comparisons: drafters learn nothing from measured prompts, and a different text gets no speed-up."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import signal
from collections import Counter
from io import StringIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from redraft import LLM, SamplingParams, registry
from redraft.bench import compare as bench
from redraft.bench import divergence, files, report, results
from redraft.bench.compare import CompareOptions, Comparison, Entry, Mode, PromptGroup, Run, Turn, order, split
from redraft.bench.divergence import Divergence, examine, first_difference
from redraft.bench.estimate import Pace, Work, duration
from redraft.bench.prompts import Prompt
from redraft.bench.results import repeated
from redraft.card import Guarantee
from redraft.cli.main import run as command
from redraft.columns import width
from redraft.errors import InvalidInput, PromptTooLong, UnknownMethod
from tests import adapters
from tests.bench import fakes

PARAMS = SamplingParams(temperature=0, max_tokens=6, seed=3, ignore_eos=True)
PROMPTS = [Prompt(f"p{i}", "ab"[i % 2], prompt=f"w{10 + i} w{20 + i} w{30 + i}") for i in range(7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS["draft"], "spy", "tests.bench.fakes:Spying")
    monkeypatch.setitem(registry.METHODS["draft"], "guess", "tests.bench.fakes:Guess")
    monkeypatch.setitem(registry.METHODS["verify"], "gullible", "tests.bench.fakes:Gullible")


@pytest.fixture(scope="module")
def plain(folder: Path) -> LLM:
    return load(folder)


def load(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), dtype="float32", prefix_sharing=False, cache_memory=1 << 20, **options)


def shown(comparison: Comparison, options: CompareOptions, found: list[results.Row], width: int = 160) -> str:
    out = StringIO()
    report.show(Console(file=out, width=width), comparison, options, found)
    return out.getvalue()


# ---- measurements and their order


def test_every_entry_takes_every_place_and_both_directions() -> None:
    for entries in (2, 3, 5):
        orders = [order(entries, 0, group) for group in range(entries)]
        for place in range(entries):
            assert sorted(one[place] for one in orders) == list(range(entries))
    neighbours = {pair for turn in (0, 1) for group in range(3) for pair in pairwise(order(3, turn, group))}
    assert {(0, 1), (1, 0)} <= neighbours


def test_runs_are_interleaved_group_by_group(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []
    measure = bench.measure

    def spied(llm: LLM, group: bench.PromptGroup, state: Any) -> Run:
        ran.append((llm.config.draft, group.prompts[0].id))
        return measure(llm, group, state)

    monkeypatch.setattr(bench, "measure", spied)
    bench.compare(plain, CompareOptions(("guess", "copyspec"), PARAMS, rounds=2), PROMPTS[:3])
    blocks = [ran[at : at + 3] for at in range(0, len(ran), 3)]
    assert len(blocks) == 2 * 3
    assert all({name for name, _ in block} == {"none", "guess", "copyspec"} and len({group for _, group in block}) == 1 for block in blocks)
    assert len({tuple(name for name, _ in block) for block in blocks}) > 2


def test_halves_are_even_in_each_category_and_over_all() -> None:
    prompts = [Prompt(f"{c}{i}", c, prompt="w5") for c, n in (("a", 5), ("b", 3), ("c", 1), ("d", 1)) for i in range(n)]
    groups = split(prompts, 2, PARAMS)
    assert sorted(prompt.id for group in groups for prompt in group.prompts) == sorted(prompt.id for prompt in prompts)
    sizes = {half: sum(len(group.prompts) for group in groups if group.half == half) for half in (0, 1)}
    assert sizes == {0: 5, 1: 5}
    for category in "ab":
        mine = [sum(len(g.prompts) for g in groups if (g.category, g.half) == (category, half)) for half in (0, 1)]
        assert abs(mine[0] - mine[1]) == 1
    assert all(len(group.prompts) <= 2 and {p.category for p in group.prompts} == {group.category} for group in groups)
    assert len({params.seed for group in groups for params in group.params}) == len(prompts)


@pytest.mark.parametrize("batch", [1, 2])
def test_nothing_is_measured_on_prompts_already_seen(plain: LLM, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    opened: list[fakes.Spy] = []
    monkeypatch.setattr(fakes.Spying, "open", lambda self, runner, sampler: opened.append(fakes.Spy()) or opened[-1])
    starts: list[frozenset[tuple[int, ...]]] = []  # what was known when a measurement of the spy began
    generate = bench.generate

    def spied(llm: LLM, group: bench.PromptGroup) -> Run:
        if timed and llm.config.draft == "spy":
            starts.append(opened[0].known)
        return generate(llm, group)

    timed: list[bool] = []
    measure = bench.measure

    def measured(*given: Any) -> Run:
        timed.append(True)
        try:
            return measure(*given)
        finally:
            timed.pop()

    monkeypatch.setattr(bench, "generate", spied)
    monkeypatch.setattr(bench, "measure", measured)
    comparison = bench.compare(plain, CompareOptions(("spy",), PARAMS, rounds=2, batch=batch), PROMPTS)
    assert [entry.mode for entry in comparison.entries] == [Mode.BASELINE, Mode.COLD, Mode.HOT]
    assert len(starts) == 2 * 2 * len(comparison.groups)
    (spy,) = opened
    assert all(own not in known for own, known in spy.log)
    ids = {prompt.id: tuple(plain.tokenizer.encode(prompt.prompt or "")) for prompt in PROMPTS}
    halves = [frozenset(ids[p.id] for g in comparison.groups if g.half == half for p in g.prompts) for half in (0, 1)]
    assert set(starts) == {frozenset(), *halves}
    assert starts.count(frozenset()) == len(starts) / 2
    assert starts.count(halves[1]) == 2 * sum(g.half == 0 for g in comparison.groups)


def test_one_prompt_has_no_hot_state(plain: LLM) -> None:
    comparison = bench.compare(plain, CompareOptions(("spy",), PARAMS, rounds=1), PROMPTS[:1])
    assert [entry.mode for entry in comparison.entries] == [Mode.BASELINE, Mode.COLD]


@pytest.mark.parametrize("draft", ["suffix", "ngram", "token-recycling", "union:parts=copyspec+suffix"])
def test_a_second_round_drafts_what_the_first_one_drafted(plain: LLM, draft: str) -> None:
    """Nothing that a round teaches reaches the next one, although the texts are the same."""
    comparison = bench.compare(plain, CompareOptions((draft,), PARAMS.but(max_tokens=20), rounds=3), PROMPTS[:4])
    for rounds in comparison.runs[1:]:
        found = [[(run.steps, run.drafted, run.accepted) for run in one] for one in rounds]
        assert found[0] == found[1] == found[2]
    llm, group = comparison.entries[1].llm, comparison.groups[0]
    first, second = bench.measure(llm, group, comparison.entries[1].states[0]), bench.generate(llm, group)
    assert first.accepted < second.accepted, "without that it would be drafted from memory"


@pytest.mark.parametrize("batch", [1, 3])
def test_warm_prompts_are_learned_once_and_not_measured(plain: LLM, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    opened: list[fakes.Spy] = []
    monkeypatch.setattr(fakes.Spying, "open", lambda self, runner, sampler: opened.append(fakes.Spy()) or opened[-1])
    warm = tuple(Prompt(f"warm{i}", "c", prompt=f"w{40 + i} w{41 + i}") for i in range(3))
    options = CompareOptions(("spy", "guess"), PARAMS, rounds=2, batch=batch, warm=warm)
    reported: list[str] = []
    comparison = bench.compare(plain, options, PROMPTS, reported.append)
    assert [entry.mode for entry in comparison.entries] == [Mode.BASELINE, Mode.COLD, Mode.WARM, Mode.SAME]
    known = frozenset(tuple(plain.tokenizer.encode(prompt.prompt or "")) for prompt in warm)
    cold, warmed = (entry.states for entry in comparison.entries[1:3])
    assert cold == (frozenset(), frozenset()) and warmed == (known, known)
    assert comparison.outputs == len(PROMPTS) and reported.count("spy learns") == (3 if batch == 1 else 2)
    text = " ".join(shown(comparison, options, results.rows(comparison)).split())
    assert "warm: learned on 3 other prompts" in text and "; hot:" not in text


def test_a_prompt_is_not_both_learned_and_measured(plain: LLM) -> None:
    warm = (dataclasses.replace(PROMPTS[1], id="other", category="c"),)
    with pytest.raises(InvalidInput, match="warm: other is also measured"):
        bench.compare(plain, CompareOptions(("spy",), PARAMS, warm=warm), PROMPTS)
    long = (Prompt("long", "a", prompt=" ".join(["w5"] * plain.max_model_len)),)
    with pytest.raises(PromptTooLong, match="warm: none of the 1 prompts fits"):
        bench.compare(plain, CompareOptions(("spy",), PARAMS, warm=long), PROMPTS)


# ---- generation alone


@pytest.mark.parametrize(
    ("times", "found"),
    [
        ([], (0, 0.0)),
        ([(3.0, "a", 1)], (0, 0.0)),
        ([(3.0, "a", 2), (4.0, "a", 1), (6.0, "a", 3)], (4, 3.0)),  # a first step with two tokens
        # b begins with the third step; what a got before and in this step does not count
        ([(1.0, "a", 1), (2.0, "a", 2), (3.0, "b", 1), (3.0, "a", 2), (4.0, "a", 1), (4.0, "b", 2), (5.5, "b", 1)], (4, 2.5)),
    ],
)
def test_tokens_after_the_first_ones(times: bench.Times, found: tuple[int, float]) -> None:
    assert bench.after_first(times) == found


@pytest.mark.parametrize("batch", [1, 4])
def test_generation_is_timed_by_steps(plain: LLM, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """With a step of two seconds the plain loop needs two seconds a token, and drafts fewer."""
    now = itertools.count(step=2.0)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(now))
    own, step = plain.engine, plain.engine.step
    groups = split(PROMPTS[:8:2], batch, PARAMS.but(max_tokens=60))
    runs = [bench.generate(plain, group) for group in groups]
    assert own.step == step
    assert all(run.generating == 2.0 * 59 and run.generated == 59 * len(run.conversations) for run in runs)
    assert all(run.seconds == 2.0 * 61 for run in runs)  # the clock is read before, after each of 60 steps, and at the end
    fast = [bench.generate(plain.sibling(draft="suffix"), group) for group in groups]
    assert sum(run.generating for run in fast) < sum(run.generating for run in runs)


def test_a_text_of_one_token_has_no_generation(plain: LLM) -> None:
    options = CompareOptions(("guess",), PARAMS.but(max_tokens=1), rounds=1)
    comparison = bench.compare(plain, options, PROMPTS[:2])
    found = results.rows(comparison)
    assert all(row.generation is None for row in found) and found[1].speedup is not None
    assert "generation" not in shown(comparison, options, found)


def test_turns_are_answered_one_after_the_other(plain: LLM) -> None:
    turns = Prompt("t", "chat", turns=["w5 w6", "w7"])
    chat = Prompt("m", "chat", messages=[{"role": "user", "content": "w8 w9"}, {"role": "assistant", "content": "w10"}])
    comparison = bench.compare(
        plain, CompareOptions(("copyspec",), PARAMS, rounds=1, batch=2), [turns, chat, dataclasses.replace(turns, id="u")]
    )
    found = {
        prompt.id: said
        for group, run in zip(comparison.groups, comparison.runs[1][0])
        for prompt, said in zip(group.prompts, run.conversations)
    }
    first, second = found["t"]
    assert (
        first.prompt == [5, 6] and second.prompt == [5, 6, *(token for token in first.tokens if token > 2), 7] and len(second.tokens) == 6
    )
    assert [turn.prompt for turn in found["m"]] == [[8, 9, 10]]
    assert found["t"] == found["u"]
    assert all(row.tokens_equal for row in results.rows(comparison))


def test_prompts_that_do_not_fit_are_named(plain: LLM) -> None:
    long = Prompt("long", "a", prompt=" ".join(["w5"] * plain.max_model_len))
    grows = Prompt("grows", "a", turns=["w5", " ".join(["w6"] * (plain.max_model_len - 4))])
    options = CompareOptions(("guess",), PARAMS, rounds=1)
    comparison = bench.compare(plain, options, [*PROMPTS[:2], long, grows])
    assert comparison.left_out == ["long"] and comparison.cut_short == ["grows"]
    text = " ".join(shown(comparison, options, results.rows(comparison)).split())
    assert "longer than the context of 96: long" in text and "before their last turn, at the context of 96: grows" in text
    with pytest.raises(PromptTooLong, match="none of the 1 prompts fits"):
        bench.compare(plain, options, [long])


# ---- is the text the same?


def test_a_method_that_lies_gets_no_speed_up(folder: Path) -> None:
    options = CompareOptions(("guess",), PARAMS, rounds=2)
    comparison = bench.compare(load(folder, verify="gullible"), options, PROMPTS)
    baseline, row, *_ = found = results.rows(comparison)
    assert baseline.tokens_equal and baseline.divergences == 0 and row.guarantee == "same-text"
    assert not row.tokens_equal and row.divergences == len(PROMPTS) and row.near_ties == 0
    assert row.first_divergence is not None and row.first_divergence.found == 7
    assert row.first_divergence.margin is not None and row.first_divergence.margin > 0.01
    liars = [one for one in found if one.method == "guess"]
    assert len(liars) == 3  # over all and two categories
    for liar in liars:
        assert (liar.speedup, liar.speedup_low, liar.speedup_high, liar.low_repeat_speedup) == (None,) * 4 and liar.withheld
    text = shown(comparison, options, found)
    assert "no 7/7" in text and "no speed-up, its tokens differ" in " ".join(text.split())


def test_a_method_that_promises_less_keeps_its_speed_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes.Gullible, "card", dataclasses.replace(fakes.Gullible.card, guarantee=Guarantee.LOSSY))
    row = results.rows(bench.compare(load(folder, verify="gullible"), CompareOptions(("guess",), PARAMS, rounds=1), PROMPTS))[1]
    assert row.guarantee == "lossy" and not row.tokens_equal and row.speedup is not None and row.withheld is None


def test_near_ties_are_excused_and_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "NEAR_TIE", 1e6)
    options = CompareOptions(("guess",), PARAMS, rounds=1)
    comparison = bench.compare(load(folder, verify="gullible"), options, PROMPTS)
    row = (found := results.rows(comparison))[1]
    assert not row.tokens_equal and row.near_ties == row.divergences == len(PROMPTS)
    assert row.speedup is not None and row.withheld is None
    assert "near 7/7" in shown(comparison, options, found)


SAMPLINGS = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0.8},
    {"temperature": 0.9, "top_p": 0.7, "repetition_penalty": 1.1, "min_tokens": 5},
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_plain_models_own_text_has_no_gap(plain: LLM, sampling: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=75, seed=11, ignore_eos=True, **sampling)  # more than one chunk of the replay
    prompt = [5, 6, 7, 8]
    text = plain.generate([{"prompt_token_ids": prompt}], params)[0].outputs[0].token_ids
    wrong = [*text[:2], (text[2] + 1) % 60, *text[3:]]
    found = examine(plain, "p", 0, prompt, wrong, text, params)
    assert found.worst is not None and found.worst < 1e-4
    assert (found.position, found.expected, found.found) == (2, wrong[2], text[2])
    assert not found.near_tie  # the plain loop breaks its own guarantee
    found = examine(plain, "p", 0, prompt, text, wrong, params)
    assert found.worst is None or found.worst > 1e-4
    assert not found.near_tie


@pytest.mark.parametrize("sampling", SAMPLINGS[:3])
def test_the_margin_is_the_distance_of_the_two_tokens(plain: LLM, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=4, seed=11, ignore_eos=True, **sampling)
    text = plain.generate([{"prompt_token_ids": [5, 6, 7]}], params)[0].outputs[0].token_ids
    replay = divergence._Replay(plain, [5, 6, 7], text, params)
    row = replay.weigh(list(replay.rows())[3], 3)
    second = int(row.values.argsort()[-2])
    gap = float(row.values.max() - row.values[second])
    monkeypatch.setattr(divergence, "NEAR_TIE", gap + 1e-3)
    close = examine(plain, "p", 0, [5, 6, 7], text, [*text[:3], second], params)
    assert close.near_tie and close.margin == pytest.approx(gap, abs=1e-5) and close.worst == pytest.approx(gap, abs=1e-5)
    monkeypatch.setattr(divergence, "NEAR_TIE", gap - 1e-3)
    assert not examine(plain, "p", 0, [5, 6, 7], text, [*text[:3], second], params).near_tie


@pytest.fixture(scope="module")
def lora(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"x={adapters.make(tmp_path_factory.mktemp('adapters') / 'x', folder)}"


def test_a_text_is_examined_with_its_adapter(folder: Path, lora: str) -> None:
    adapted, params = load(folder, lora=lora), SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, lora="x")
    text = adapted.generate([{"prompt_token_ids": [5, 6, 7]}], params)[0].outputs[0].token_ids
    wrong = [*text[:2], (text[2] + 1) % 60, *text[3:]]
    worst = examine(adapted, "p", 0, [5, 6, 7], wrong, text, params).worst
    without = examine(adapted, "p", 0, [5, 6, 7], wrong, text, params.but(lora=None)).worst
    assert worst is not None and worst < 1e-4
    assert without is not None and without > 1e-2


def test_the_command_measures_with_an_adapter(
    folder: Path, file: Path, lora: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str | None] = set()
    measure = bench.measure
    monkeypatch.setattr(bench, "measure", lambda llm, group, state: seen.update(p.lora for p in group.params) or measure(llm, group, state))
    words = f"--prompts {file} --draft guess --max-tokens 5 --rounds 1 --dtype float32 --lora {lora} --json {tmp_path}/out.json"
    assert command(["compare", str(folder), *words.split()]) == 0
    assert seen == {"x"} and ", adapter x, temperature" in " ".join(capsys.readouterr().out.split())
    settings = json.loads((tmp_path / "out.json").read_text())["settings"]
    assert settings["lora"] == [lora] and settings["params"]["lora"] == "x"


def test_a_token_at_the_cut_of_a_filter_is_a_near_tie_only_within_the_tolerance(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=4, seed=11, ignore_eos=True, temperature=0.8, top_k=1)
    text = plain.generate([{"prompt_token_ids": [5, 6, 7]}], params)[0].outputs[0].token_ids
    logits = list(divergence._Replay(plain, [5, 6, 7], text, params).rows())[3]
    second = int(logits.argsort()[-2])
    gap = float(logits.max() - logits[second])
    for most, near in ((gap * 1.1, True), (gap * 0.9, False)):
        monkeypatch.setattr(divergence, "NEAR_TIE", most)
        found = examine(plain, "p", 0, [5, 6, 7], text, [*text[:3], second], params)
        assert found.near_tie is near and found.margin is None


def test_a_text_that_ends_early_is_no_near_tie(plain: LLM) -> None:
    found = examine(plain, "p", 1, [5], [6, 7, 8], [6, 7], PARAMS)
    assert found == Divergence("p", 1, 2, 8, None, None, None, False)
    assert first_difference([1, 2], [1, 2]) is None and first_difference([1, 2], [1, 3]) == 1 and first_difference([1], [1, 2]) == 1
    plain.runner.memory.check()


def test_tolerances() -> None:
    logits = torch.tensor([-8.0, 4.0]).double().numpy()
    assert divergence.tolerance(torch.float64, logits) == 0
    assert divergence.tolerance(torch.float32, logits) == 1e-4
    assert divergence.tolerance(torch.bfloat16, logits) == pytest.approx(8 * 2**-6)


# ---- estimated duration


class Clock:
    """A clock that generation advances: by `read` seconds for each token of a prompt, by `written` for each step of a group."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, read: float, written: float) -> None:
        self.now, self.read, self.written, inner = 0.0, read, written, LLM.generate
        monkeypatch.setattr(bench.time, "perf_counter", lambda: self.now)

        def generate(llm: LLM, prompts: Any, params: Any) -> Any:
            outputs = inner(llm, prompts, params)
            self.now += self.read * sum(len(output.prompt_token_ids) for output in outputs)
            self.now += self.written * max(len(output.outputs[0].token_ids) for output in outputs)
            return outputs

        monkeypatch.setattr(LLM, "generate", generate)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("read", "written"), [(0.25, 2.0), (3.0, 0.125)])
def test_the_estimated_duration_is_that_of_the_measurements(
    plain: LLM, monkeypatch: pytest.MonkeyPatch, batch: int, read: float, written: float
) -> None:
    """Including cold, hot, learning, turns and groups, if every text has its maximum length."""
    clock, found = Clock(monkeypatch, read, written), []
    params = SamplingParams(temperature=0, max_tokens=9, seed=3, ignore_eos=True)
    prompts = [*PROMPTS, Prompt("t", "b", turns=["w5 w6", "w7 w8 w9"])]

    def announce(seconds: float) -> None:
        found.append((seconds, clock.now))

    bench.compare(plain, CompareOptions(("spy", "copyspec"), params, rounds=2, batch=batch), prompts, announce=announce)
    ((seconds, start),) = found
    assert start > 0 and seconds == pytest.approx(clock.now - start, rel=0.04)  # a reply is not read back token for token


def test_the_estimate_is_not_too_short_where_the_warm_up_says_little() -> None:
    short, long, work = Work(100, 1), Work(100, 9), Work(1000, 900)
    assert Pace.of(short, 3.0, long, 7.0).seconds(work) == pytest.approx(0.025 * 1000 + 0.5 * 900)
    assert Pace.of(short, 5.0, long, 4.5).seconds(work) == pytest.approx(0.5 * 900)  # the longer run was quicker
    assert Pace.of(short, 3.0, short, 3.5).seconds(work) == pytest.approx(3.5 * 900)  # the text ended at once


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 second"), (42.4, "42 seconds"), (100, "2 minutes"), (3600, "60 minutes"), (9000, "2.5 hours")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# ---- Ctrl-C


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Sends a real signal in the measurement after this many."""
    measure, calls = bench.measure, itertools.count()

    def spied(*given: Any) -> Run:
        if next(calls) == after:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(*given)

    monkeypatch.setattr(bench, "measure", spied)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("after", "rounds", "groups"), [(2, 1, 1), (5, 1, 2), (6, 1, 3), (8, 1, 3), (12, 2, 3), (17, 2, 3)])
def test_ctrl_c_keeps_what_all_entries_have_measured(
    plain: LLM, monkeypatch: pytest.MonkeyPatch, after: int, rounds: int, groups: int
) -> None:
    interrupt(monkeypatch, after)
    comparison = bench.compare(plain, CompareOptions(("guess",), PARAMS, rounds=3), PROMPTS[:3])
    assert comparison.stopped and (comparison.rounds, len(comparison.groups), comparison.outputs) == (rounds, groups, groups)
    assert all(len(one) == rounds and all(len(part) == groups for part in one) for one in comparison.runs)
    assert all(row.tokens_equal for row in results.rows(comparison))


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("after", [0, 1])
def test_ctrl_c_before_anything_can_be_compared(plain: LLM, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    interrupt(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        bench.compare(plain, CompareOptions(("guess",), PARAMS, rounds=3), PROMPTS[:3])
    plain.runner.memory.check()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_prints_the_table_and_writes_the_file(
    folder: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, 7)
    out = tmp_path / "out.json"
    words = f"--prompts {file} --draft guess --max-tokens 5 --rounds 3 --dtype float32 --json {out}"
    assert command(["compare", str(folder), *words.split()]) == 130
    shown = capsys.readouterr()
    assert "guess, same-text" in shown.out and "stopped by Ctrl-C: of 3 rounds 1 of 3 prompts are shown" in shown.out
    assert "stopped: the table holds" in shown.err and "Traceback" not in shown.err
    found = json.loads(out.read_text())
    assert found["stopped"] and found["settings"]["rounds"] == 1 and found["settings"]["outputs"] == 3
    assert all(row["tokens_equal"] for row in found["rows"])


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_with_nothing_measured(folder: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redraft: Any) -> None:
    interrupt(monkeypatch, 0)
    out = tmp_path / "out.json"
    code, table, err = redraft("compare", str(folder), "--prompts", str(file), "--draft", "guess", "--dtype", "float32", "--json", str(out))
    assert (code, table, err.splitlines()[-1]) == (130, "", "stopped") and not out.exists()


def test_a_job_in_the_background_is_not_interrupted(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt(monkeypatch, 3)
        comparison = bench.compare(plain, CompareOptions(("guess",), PARAMS, rounds=1), PROMPTS[:3])
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert not comparison.stopped and comparison.rounds == 1


# ---- rows


@pytest.mark.parametrize(
    ("tokens", "covered"),
    [
        ([1, 2, 3], 0),
        (list(range(40)), 0),
        ([*range(8), *range(8)], 16),
        ([*range(8), 99, *range(8), 98], 16),
        ([5] * 9, 9),
        ([5] * 8, 0),  # one 8-gram, once
        ([*range(7), 99, *range(7)], 0),
    ],
)
def test_repeated_8_grams(tokens: list[int], covered: int) -> None:
    assert repeated(tokens) == covered


def made(seconds: dict[int, list[float]], outputs: list[list[int]], category: str = "ab") -> Comparison:
    """One prompt in each group; seconds[entry][round] for every group."""
    llm = cast(Any, SimpleNamespace(guarantee=Guarantee.SAME_TEXT))
    groups = split([Prompt(str(i), category[i % len(category)], prompt="x") for i in range(len(outputs))], 1, PARAMS)
    mine = {p.id: outputs[int(p.id)] for g in groups for p in g.prompts}
    entries = [Entry("none", Mode.BASELINE, llm, (None, None)), Entry("some", Mode.SAME, llm, (None, None))]

    def run(group: PromptGroup, e: int, one: float) -> Run:
        tokens = mine[group.prompts[0].id]
        return Run([[Turn([1], tokens)]], one, len(tokens) - 1, one / 2, steps=10, accepted=5 * e, peak=1000 * (2 + e))

    runs = [[[run(group, e, one) for group in groups] for one in seconds[e]] for e in range(2)]
    return Comparison(entries, groups, runs, [], [])


def test_rows_compare_within_each_round() -> None:
    outputs = [list(range(20)) for _ in range(3)] + [[5] * 20] * 3
    baseline, row, *rest = results.rows(made({0: [1.0, 2.0, 4.0], 1: [0.5, 2.5, 1.0]}, outputs))
    assert (row.speedup, row.speedup_low, row.speedup_high) == (2.0, 0.8, 4.0)
    assert row.tokens_per_second == 20 and baseline.tokens_per_second == 10 and baseline.speedup is None
    assert row.mean_acceptance_length == 1.5 and baseline.mean_acceptance_length == 1
    assert row.peak_kv_bytes == 3000 and row.repeated_8gram_share == 0.5 and row.outputs == 6
    assert row.low_repeat_outputs == 3 and row.low_repeat_speedup is None  # fewer than five
    assert [one.category for one in rest] == ["a", "a", "b", "b"] and sum(one.outputs for one in rest) == 12
    assert [one.category for one in results.rows(made({0: [1.0], 1: [1.0]}, outputs, "a"))] == [None, None]


def test_generation_and_bounds_are_those_of_the_pairs() -> None:
    outputs = [list(range(20)) for _ in range(6)]
    baseline, row, *_ = results.rows(made({0: [1.0, 2.0, 4.0], 1: [0.5, 2.5, 1.0]}, outputs))
    assert baseline.generation is not None and baseline.generation.tokens_per_second == 19 and baseline.generation.speedup is None
    alone = row.generation
    assert alone is not None and alone.tokens_per_second == 38
    assert (alone.speedup, alone.speedup_low, alone.speedup_high) == pytest.approx((2.0, 0.8, 4.0))
    assert row.speedup_bound == pytest.approx(7 / 4) and alone.speedup_bound == pytest.approx(7 / 4)  # all texts are alike
    assert baseline.speedup_bound is None
    one = results.rows(made({0: [1.0], 1: [0.5]}, outputs[:1]))[1]
    assert one.speedup == 2 and one.speedup_bound is None, "one text has no spread"


def test_the_bound_is_that_of_the_bootstrap() -> None:
    """Half of the texts gain a factor of 3, the others lose: the bound lies where a normal approximation has it."""
    comparison = made({0: [1.0], 1: [1.0]}, [list(range(20)) for _ in range(100)], "a")
    for g, run in enumerate(comparison.runs[1][0]):
        run.seconds = 1 / 3 if g % 2 else 1.25
    row = results.rows(comparison)[1]
    mean, spread = (1 / 3 + 1.25) / 2, (1.25 - 1 / 3) / 2
    assert row.speedup == pytest.approx(1 / mean)
    assert row.speedup_bound == pytest.approx(1 / (mean + 1.645 * spread / 10), rel=0.01)
    assert results.rows(comparison)[1].speedup_bound == row.speedup_bound


def test_the_chooser_stands_beside_the_fastest_other_method_of_each_category() -> None:
    comparison = made({0: [4.0, 4.0], 1: [1.0, 2.0]}, [list(range(20)) for _ in range(8)])  # categories a and b
    llm, groups = comparison.entries[0].llm, comparison.groups
    modes = [Mode.BASELINE, Mode.COLD, Mode.HOT, Mode.COLD, Mode.HOT, Mode.SAME]
    names = ["none", "auto", "auto", "suffix", "suffix", "copyspec"]
    entries = [Entry(name, mode, llm, (None, None)) for name, mode in zip(names, modes, strict=True)]
    seconds = {"auto": {"a": 1.0, "b": 1.0}, "suffix": {"a": 0.5, "b": 4.0}, "copyspec": {"a": 1.0, "b": 2.0}}

    def timed(runs: list[Run], name: str, mode: Mode) -> list[Run]:
        slower = 2 if mode is Mode.COLD else 1
        times = [seconds[name][group.category] * slower for group in groups]
        return [dataclasses.replace(run, seconds=time, generating=time / 4) for run, time in zip(runs, times, strict=True)]

    runs = [comparison.runs[0]] + [[timed(one, e.method, e.mode) for one in comparison.runs[1]] for e in entries[1:]]
    comparison = dataclasses.replace(comparison, entries=entries, runs=runs)
    found = results.rows(comparison)
    beside = {(row.category, row.mode): row.beside for row in found if row.method == "auto"}
    assert beside["a", "cold"] == results.Beside("suffix", "cold", 0.5, 0.5, 0.5, pytest.approx(0.5))
    assert beside["b", "hot"] == results.Beside("copyspec", "cold=hot", 2.0, 2.0, 2.0, pytest.approx(2.0))
    assert beside["b", "cold"] is not None and beside["b", "cold"].ratio == 1
    assert beside[None, "hot"] is not None and beside[None, "hot"].method == "copyspec"  # 3 a pair of texts, suffix 4.5
    assert all(row.beside is None for row in found if row.method != "auto")
    assert all(row.generation is not None and row.generation.beside == row.beside for row in found if row.method == "auto")
    assert results.rows(made({0: [1.0], 1: [1.0]}, [[1, 2]]))[1].besides == []


def test_low_repeat_speed_up_needs_five_outputs() -> None:
    row = results.rows(made({0: [1.0], 1: [0.5]}, [list(range(20)) for _ in range(5)] + [[5] * 20]))[1]
    assert (row.low_repeat_outputs, row.low_repeat_speedup) == (5, 2.0)


# ---- output


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": p.id, "category": p.category, "prompt": p.prompt}) + "\n" for p in PROMPTS[:3]))
    return path


def test_the_command_prints_a_table_and_writes_json(folder: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    words = f"--prompts {file} --draft guess --draft token-recycling --max-tokens 5 --rounds 1 --dtype float32 --json {out}"
    assert command(["compare", str(folder), *words.split()]) == 0
    shown = capsys.readouterr()
    assert "token-recycling" in shown.out and "tokens/s" in shown.out and "fewer than 5" in " ".join(shown.out.split())
    found = json.loads(out.read_text())
    assert {"model", "hardware", "commit", "baseline", "settings", "rows"} <= set(found)
    assert found["baseline"] == "none" and found["model"] == str(folder)
    assert {"cpu", "cores", "threads", "torch"} <= set(found["hardware"])
    wanted = "method mode category guarantee tokens_per_second speedup speedup_low speedup_high mean_acceptance_length tokens_equal"
    wanted += " first_divergence near_ties repeated_8gram_share peak_kv_bytes low_repeat_outputs low_repeat_speedup"
    wanted += " speedup_bound generation beside"
    assert all(set(wanted.split()) <= set(row) for row in found["rows"])
    assert all(row["generation"]["tokens_per_second"] > 0 for row in found["rows"]) and found["settings"]["warm"] == []
    assert all((row["generation"]["speedup"] is None) == (row["method"] == "none") for row in found["rows"])
    assert "generation alone, after the first token" in shown.out and "beside the fastest" not in shown.out
    overall = [(row["method"], row["mode"]) for row in found["rows"] if row["category"] is None]
    assert overall == [("none", "baseline"), ("guess", "cold=hot"), ("token-recycling", "cold"), ("token-recycling", "hot")]
    assert all(row["tokens_equal"] and row["first_divergence"] is None for row in found["rows"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "prompts.jsonl"]


def test_one_file_has_the_measured_and_the_warm_prompts(
    folder: Path, file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    words = f"--prompts {file} --limit 2 --warm {file} --warm-limit 5 --draft ngram --max-tokens 5 --rounds 1 --dtype float32 --json {out}"
    assert command(["compare", str(folder), *words.split()]) == 0
    settings = json.loads(out.read_text())["settings"]
    assert settings["outputs"] == 2 and settings["warm"] == ["p2"]
    assert "warm: learned on 1 other prompt;" in " ".join(capsys.readouterr().out.split())


DRAFTS = [*registry.METHODS["draft"], "union:parts=copyspec+token-recycling", "auto"]


@pytest.fixture(scope="module")
def bounded(plain: LLM) -> tuple[CompareOptions, Comparison]:
    """A comparison with a bound, of a model with a long name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "name", "HuggingFaceTB/SmolLM2-135M-Instruct")
        patch.setitem(registry.METHODS["draft"], "guess", "tests.bench.fakes:Guess")
        options = CompareOptions(("guess",), PARAMS, rounds=1, bound=True)
        return options, bench.compare(plain, options, PROMPTS)


@pytest.mark.parametrize("columns", ["80", None])
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_table_fits_80_columns_with_every_name_whole(
    bounded: tuple[CompareOptions, Comparison],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    draft: str,
    columns: str | None,
) -> None:
    large = {"tokens_per_second": 12345.6, "speedup": 0.94, "speedup_low": 10.25, "speedup_high": 12.75, "peak_kv_bytes": 20_000 << 20}
    alone = results.Speed(12345.6, 12000.0, 13000.0, 0.94, 10.25, 12.75, 10.11, results.Beside(draft, "cold=hot", 10.25, 9.75, 12.5, 9.5))
    options, comparison = bounded
    entries = [entry if i == 0 else dataclasses.replace(entry, method=draft) for i, entry in enumerate(comparison.entries)]
    comparison = dataclasses.replace(comparison, entries=entries, stopped=True, refused=[f"{draft}: needs a model"])
    found = [
        dataclasses.replace(
            row,
            **large,
            generation=alone,
            beside=alone.beside,
            speedup_bound=10.1,
            outputs=100,
            tokens_equal=False,
            divergences=100,
            near_ties=ties,
            fault=f"{draft} failed",
        )
        for row in results.rows(comparison)
        for ties in (0, 100)
    ]
    if columns is None:
        monkeypatch.delenv("COLUMNS")
    else:
        monkeypatch.setenv("COLUMNS", columns)
    report.show(Console(width=width()), comparison, options, found)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert "beside the fastest other method" in lines and any(line.split()[:2] == ["baseline", "generation"] for line in lines)
    assert f"{draft}, same-text" in lines and any(f"{draft}: needs a model" in line for line in lines)


def test_the_drafters_inside_a_method_are_named(folder: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--draft", "auto", "--draft", "copyspec", "--max-tokens", "12", "--rounds", "1", "--dtype", "float32", "--temperature", "0"]
    assert command(["compare", str(folder), "--prompts", str(file), *options]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"- auto cold: \d+\.\d nodes drafted a step", out) and "copyspec cold=hot: " not in out


def test_each_category_says_why_it_pays_or_not() -> None:
    row = results.rows(made({0: [1.0], 1: [1.0]}, [[1, 2]]))[1]
    faster, equal, slower = (results.Speed(1.0, 1.0, 1.0, *ratios) for ratios in ((1.5, 1.4, 1.6), (1.0, 0.9, 1.1), (0.9, 0.8, 0.95)))
    shown = [
        dataclasses.replace(row, method="auto", mode="cold", category=name, mean_acceptance_length=1.8, generation=speed)
        for name, speed in (("chat", faster), ("a category with a long name", equal), ("other", slower), (None, faster), ("none", None))
    ]
    lines = [str(line).split() for line in report._reasons([*shown, dataclasses.replace(shown[0], method="suffix")])]
    assert " ".join(lines[-1]) == report.VERDICTS and len(report.VERDICTS) <= 80
    assert lines[3:-1] == [
        ["chat", "cold", "1.80", "1.20", "1.50x", "1.40-1.60", "pays"],
        ["a", "category", "with", "a", "l…", "cold", "1.80", "1.80", "1.00x", "0.90-1.10", "as", "plain"],
        ["other", "cold", "1.80", "2.00", "0.90x", "0.80-0.95", "slower"],
    ]
    assert list(report._reasons(shown[3:])) == [], "a single category"


def test_where_drafts_came_from_and_what_stopped() -> None:
    run = bench.Run([], steps=10, drafted=25, by_drafter=Counter({"a": 6, "b": 2}), stopped=Counter({"b": 5}))
    entry: Any = SimpleNamespace(method="auto", mode=Mode.COLD)
    note = "auto cold: 2.5 nodes drafted a step, kept ones from a 75%, b 25%; stopped where drafts did not pay: b in 50% of steps"
    assert report._drafts(entry, [[run]]) == note
    assert report._drafts(entry, [[bench.Run([], steps=10, by_drafter=Counter({"a": 6}))]]) == "", "one drafter that never stopped"


def test_a_slower_method_is_called_slower() -> None:
    rows = results.rows(made({0: [1.0], 1: [2.0]}, [list(range(20))]))
    assert str(report._speedup(rows[1])) == "0.50x slower"


def test_a_difference_within_the_rounds_is_not_called_slower() -> None:
    rows = results.rows(made({0: [1.0, 1.0, 1.0], 1: [1.01, 1.02, 0.9]}, [list(range(20))]))
    assert str(report._speedup(rows[1])) == "0.99x" and rows[1].speedup_low < 1 < rows[1].speedup_high


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        files.write(path, {"a": float("inf")})
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "new \ud800")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        ("--draft token-recyclin", "did you mean 'token-recycling'"),
        ("--draft copyspec:gama=3", "unknown option 'gama'"),
        ("--draft copyspec --draft copyspec", "given more than once"),
        ("--batch 0", "batch = 0"),
        ("--rounds 0", "rounds = 0"),
        ("--temperature -1", "temperature = -1.0"),
        ("--json /nowhere/at/all.json", "there is no folder /nowhere/at"),
        ("--json /", "is a folder"),
        ("--prompts /nowhere.jsonl", "/nowhere.jsonl: cannot be read"),
        ("--warm /nowhere.jsonl", "/nowhere.jsonl: cannot be read"),
        ("--warm-limit 3", "warm_limit = 3: is for the prompts of warm, and there are none"),
        ("--turns 0", "turns = 0: must be 1 or more"),
        ("--draft none", "is the plain loop"),
        ("--lora x=a --lora y=b", "--lora = ['x=a', 'y=b']: one adapter is measured at a time, 2 are given"),
        ("--lora x=a --against transformers", "lora = 'x': cannot be used with against"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_loaded(words: str, reported: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["compare", "/no/such/model", *words.split()]) == 2
    error = capsys.readouterr().err
    assert reported in error and error.count("\n") == 1


@pytest.mark.parametrize(("load", "busy"), [(0.9, False), (2.0, False), (2.6, True), (30.0, True)])
def test_a_busy_machine_is_reported(load: float, busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 99.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr("time.process_time", lambda: 30.0)  # 0.5 of the load
    assert not busy or f"busy, load {load - 0.5:.1f} by others on 4 cores" in report.busy()
    assert bool(report.busy()) == busy
    monkeypatch.delattr(os, "getloadavg")
    assert report.busy() == ""


@pytest.mark.parametrize("verb", ["compare", "tune"])
def test_the_commands_say_first_that_the_machine_is_busy(
    verb: str, folder: Path, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "EVERY", math.inf)  # of the progress, which a slow machine would show before
    for warning in ("busy, so busy", ""):
        monkeypatch.setattr(report, "busy", lambda warning=warning: warning)
        words = f"--prompts {file} --draft guess --max-tokens 5 --rounds 2 --dtype float32 --limit 2"
        assert command([verb, str(folder), *words.split()]) == 0
        assert capsys.readouterr().err.startswith("busy, so busy\nestimated" if warning else "estimated")


def test_options_are_checked() -> None:
    with pytest.raises(UnknownMethod):
        CompareOptions(("nothing-like-it",), PARAMS)
    with pytest.raises(InvalidInput, match="at least one method"):
        CompareOptions((), PARAMS)
