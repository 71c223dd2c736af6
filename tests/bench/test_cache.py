"""Scores are those of generation, budgets are kept, and the report says what it cannot show."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
from rich.console import Console

from redraft import LLM, SamplingParams, registry
from redraft.bench import cache, curves
from redraft.bench.cache import FULL, CacheOptions, Footprint, Measured, PolicyAtBudget, Result, Scores, bootstrap, score
from redraft.bench.tasks import Answer, Probe, Task, Wanted, build
from redraft.card import NOTHING, Card, Guarantee
from redraft.core.sequence import Onset, Request, Sequence
from redraft.engine import budgets
from redraft.engine.budgets import Policy
from redraft.errors import InvalidInput, Unsupported
from redraft.kv.eviction.eviction import OpenEviction, StatelessEviction
from redraft.kv.slots import Held, Kept
from redraft.kv.table import PageTable
from redraft.layer_skipping.layer_skipping import SameLayers
from redraft.models.trained import model_hash
from tests.checkpoints import tiny_llama

TEXT = "".join(chr(97 + i * i % 23) for i in range(3000))


@dataclass(frozen=True)
class Newest(StatelessEviction):
    """When 2 * `budget` tokens are stored, evicts all but the newest `budget`. budget: a multiple of 32."""

    budget: int = 64
    card: ClassVar[Card] = Card("Newest", "nobody, nothing, 2025", Guarantee.LOSSY)

    def __post_init__(self) -> None:
        if self.budget < 32:
            raise InvalidInput(f"newest:budget={self.budget}: must be 32 or more")

    def open(self, runner: Any) -> OpenEviction:
        return self

    def onset(self, context: int) -> Onset:
        return Onset(2 * self.budget, 2 * self.budget, slots=self.budget, most=2 * self.budget, longest=2 * self.budget)

    def sync_point(self, seq: Sequence) -> int:
        return (seq.stored // self.budget + 1) * self.budget

    def decide(self, seq: Sequence, held: Held) -> Kept | None:
        lanes = held.positions()
        if len(lanes[0]) < 2 * self.budget:
            return None
        return Kept([np.arange(len(lane) - self.budget, len(lane), dtype=np.int32) for lane in lanes])


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return load(str(tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")))


def load(path: str) -> LLM:
    return LLM(path, dtype="float64", prefix_sharing=False, cache_memory=1 << 22)


@pytest.fixture(autouse=True)
def newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS["keep"], "newest", f"{__name__}:Newest")


@pytest.fixture(scope="module")
def tasks(llm: LLM) -> list[Task]:
    return build(llm.tokenizer, {"text": [TEXT]}, Wanted(250, 2, 2, 8), llm.max_model_len - 1)


def quiet(what: str) -> None:
    pass


# ---- scores


def test_scores_are_the_models_own_log_probabilities(llm: LLM) -> None:
    """Compared with log-probabilities from generation, for a text that greedy decoding writes and for another one."""
    prompt = llm.tokenizer.encode(TEXT[:40])
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
    (written,) = llm.generate([{"prompt_token_ids": prompt}], params)[0].outputs
    wrong = [*written.token_ids[:5], (written.token_ids[5] + 1) % llm.runner.spec.vocab]
    answers = (Answer(0, 41, 44), Answer(1, 44, 47))
    probes = [Probe(i, [*prompt, *ids], 8, answers) for i, ids in enumerate((written.token_ids, wrong))]
    found = score(llm, Task("t", ("a", "b"), probes, []), probes, FULL, 2, quiet)
    reported = [one.logprob for one in written.logprobs or []]
    assert found.logprobs[0] == pytest.approx([np.mean(reported[:3]), np.mean(reported[3:])], abs=1e-12)
    assert found.logprobs[1, 0] == pytest.approx(found.logprobs[0, 0], abs=1e-12) and found.logprobs[1, 1] < found.logprobs[0, 1]
    assert found.right.tolist() == [[1, 1], [1, 0]]


SMALLER = {"read=infllm:tokens={tokens}": "read=infllm:tokens={tokens},local=16,sinks=4,block=32"}  # for texts of a few hundred tokens
STANDING = [
    SMALLER.get(policy.text, policy.text)
    for policy in budgets.registered()
    if all(registry.method(seam, registry.parse(method)[0]).card.needs == "nothing" for seam, method in policy.parts)  # type: ignore[attr-defined]
]


@pytest.mark.parametrize("text", ["keep=newest:budget=32", *STANDING])
def test_one_pass_scores_every_turn_as_if_the_text_ended_there(llm: LLM, tasks: list[Task], text: str) -> None:
    """Turn by turn over the right answers, as in SCBench, compared with the one pass that is measured."""
    task = next(task for task in tasks if task.name == "key-value, multi-turn")
    policy = Policy.of(text)
    choice = PolicyAtBudget(policy.name, 70.0, None, policy.at(70, task.longest))
    try:
        llm.engine.policies.check(SamplingParams(**choice.params))
    except Unsupported as error:
        if "do not divide the head size" not in str(error):
            raise
        pytest.skip(str(error))
    together = score(llm, task, task.probes, choice, 8, quiet)
    apart = [Probe(probe.item, probe.ids[: answer.last], probe.context, (answer,)) for probe in task.probes for answer in probe.answers]
    alone = score(llm, task, apart, choice, 3, quiet)
    assert together.logprobs == pytest.approx(alone.logprobs, abs=1e-9) and (together.right == alone.right).all()
    if "codec" not in text:
        full = score(llm, task, task.probes, FULL, 8, quiet)
        assert np.abs(together.logprobs - full.logprobs).min() > 1e-9, "a policy that changes nothing would pass"


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(str(tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")), dtype="float32", cache_memory=1 << 22)


@pytest.mark.parametrize("params", [{}, {"keep": "h2o:budget=0.3"}, {"keep": "newest:budget=32"}, {"codec": "int8"}])
def test_neither_the_order_of_questions_nor_answers_of_the_model_leave_a_trace(sharing: LLM, tasks: list[Task], params: Any) -> None:
    """A context is read once, and each question starts from it: bit for bit the same scores in any order, and behind the model's own
    answers."""
    task = next(task for task in tasks if task.name == "facts, multi-request")
    choice = PolicyAtBudget("policy", None, None, params)
    first = score(sharing, task, task.probes, choice, 8, quiet)
    backwards = score(sharing, task, task.probes[::-1], choice, 3, quiet)
    given = [{"prompt_token_ids": probe.ids[: probe.answers[0].first]} for probe in task.probes]
    sharing.generate(given, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, **params))
    again = score(sharing, task, task.probes, choice, 8, quiet)
    for other in (backwards, again):
        assert (first.logprobs == other.logprobs).all() and (first.right == other.right).all()


def test_a_context_is_read_once(sharing: LLM, tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    task = next(task for task in tasks if task.name == "facts, multi-request")
    probes = [replace_first(probe) for probe in task.probes]
    cached: list[int] = []
    generate = sharing.generate

    def counted(given: Any, params: Any) -> Any:
        found = generate(given, params)
        cached.extend(one.cached_tokens for one in found)
        return found

    monkeypatch.setattr(sharing, "generate", counted)
    score(sharing, task, probes, FULL, 8, quiet)
    assert cached == [0, 0, *(probe.context // 32 * 32 for probe in probes)], "in whole pages"


def replace_first(probe: Probe) -> Probe:
    """The same text with another first token, so that no earlier test has read it."""
    return dataclasses.replace(probe, ids=[probe.ids[1], *probe.ids[1:]])


def test_policies_act_behind_the_context_only(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """read and depth count tokens before `context` as given, so scores there are those of the full cache."""
    monkeypatch.setitem(registry.METHODS["depth"], "top", f"{__name__}:Top")
    ids = llm.tokenizer.encode(TEXT[:100])
    answers = (Answer(0, 30, 60), Answer(1, 61, 90))
    task = Task("t", ("before", "behind"), [Probe(0, ids, 60, answers), Probe(1, ids, 60, answers)], [])
    own, full = (score(llm, task, task.probes, choice, 2, quiet) for choice in (PolicyAtBudget("top", None, None, {"depth": "top"}), FULL))
    assert own.logprobs[:, 0] == pytest.approx(full.logprobs[:, 0], abs=1e-12)
    assert np.abs(own.logprobs[:, 1] - full.logprobs[:, 1]).min() > 1e-3


@dataclass(frozen=True)
class Top:
    """Skips the layer in the middle."""

    card: ClassVar[Card] = Card("Top", "nobody, nothing, 2025", Guarantee.LOSSY)

    def open(self, runner: Any) -> SameLayers:
        count = len(runner.spec.layers)
        return SameLayers({0, count - 1}, count)


# ---- policies and budgets


@pytest.mark.parametrize(
    ("given", "reported"),
    [
        ({"policies": ("keep=newest:budget={token}",)}, "no number {token}: did you mean 'tokens'"),
        ({"budgets": (0.0,)}, "budget = 0: percent above 0 and up to 100"),
        ({"budgets": (120.0,)}, "budget = 120: percent"),
        ({"batch": 0}, "batch = 0: must be 1 or more"),
        ({"memory": 100}, "memory = 100: must be 0 or more than 192"),
    ],
)
def test_bad_options_are_one_line(given: dict[str, Any], reported: str) -> None:
    with pytest.raises(InvalidInput, match=reported) as caught:
        CacheOptions(**given)
    assert "\n" not in str(caught.value)


def test_what_a_model_cannot_have_is_left_out_and_named(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "registered", lambda: [Policy.of("keep=newest:budget={tokens}"), Policy.of("depth=top")])
    monkeypatch.setitem(registry.METHODS["depth"], "top", f"{__name__}:Top")
    refused: cache.Refused = {}
    found = cache.choices(llm, CacheOptions(), 100, refused)
    assert [(one.label, one.tokens) for one in found] == [("newest at 50 %", 50), ("top", None)]
    assert refused == {"newest": {of: f"newest:budget={of:g}: must be 32 or more" for of in (25.0, 10.0, 5.0)}}
    with pytest.raises(InvalidInput, match="newest:budget=25: must be 32"):
        cache.choices(llm, CacheOptions(("keep=newest:budget={tokens}",), (25.0,)), 100, {})


def test_a_codec_is_placed_by_its_bytes(llm: LLM) -> None:
    assert cache.stored(llm, {"keep": "newest"}) is None
    for name in registry.METHODS["codec"]:
        try:
            share = cache.stored(llm, {"codec": name})
        except (InvalidInput, Unsupported) as error:  # a file that is not there, or heads of size 6
            if "no profile" not in str(error) and "head size" not in str(error):
                raise
            continue
        assert share is not None and 0.02 < share < 0.6, f"{name}: codes of float64 numbers"


def test_the_plan_says_how_much_will_run(llm: LLM, tasks: list[Task]) -> None:
    plan = cache.RunPlan.of(llm, CacheOptions(("keep=newest:budget={tokens}",), (100.0, 40.0), 3, memory=200), tasks)
    ticked: list[str] = []
    measured = cache.measure(llm, plan, ticked.append)
    assert len(ticked) == plan.ticks and {line.partition(":")[0] for line in ticked} == {task.name for task in tasks} | {"memory"}
    assert [len(one.runs) for one in measured.results] == [2] * len(tasks) and len(measured.footprints) == 3
    for one in measured.results:
        same, tight = (scores for _, scores in one.runs)
        assert (same.logprobs == one.full.logprobs).all() and not np.allclose(tight.logprobs, one.full.logprobs)
        assert (one.control is None) == (one.task.name == "text")


# ---- memory


def test_the_whole_cache_grows_and_a_budget_does_not(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LAST", 32)
    tokens, block = 370, llm.runner.memory.paged.store.block_bytes
    full = cache.footprint(llm, FULL, tokens, quiet)
    assert full.peak == -(-(tokens - cache.LAST) // 32) * block, "all but the last tokens, in pages of 32"
    assert full.steady <= full.peak and full.seconds > 0
    short = cache.footprint(llm, PolicyAtBudget("newest", 25.0, 64, {"keep": "newest:budget=64"}), tokens, quiet)
    assert 2 * block <= short.steady <= 4 * block and short.steady < short.peak < full.peak, "64 to 128 tokens while it is written"
    assert short.beside > full.beside, "another request runs in what was freed"


def test_only_what_ran_beside_the_text_counts(llm: LLM) -> None:
    counts = []
    for more in (-64, 64):
        engine = cache.pool(llm, 300, 10)
        engine.add(Request("text", [5] * 8, SamplingParams(temperature=0, max_tokens=160, ignore_eos=True, seed=0)))
        for _ in range(64):
            engine.step()
        counts.append(
            (
                engine.memory.available() * 32 + more,
                cache.neighbour(engine, [5], engine.memory.available() * 32 + more),
            )
        )
    (fits, ran), (_, waited) = counts
    assert ran == fits + cache.REPLY and waited == 0


def lost(self: PageTable, pool: Any, page: int, release: Any = PageTable._release) -> None:
    if page != 5:
        release(self, pool, page)


@pytest.mark.parametrize(("name", "broken"), [("_release", lost), ("free", lambda self, seq: None)])
def test_pages_that_are_not_given_back_are_noticed(llm: LLM, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any) -> None:
    monkeypatch.setattr(PageTable, name, broken)
    with pytest.raises(AssertionError, match=r"blocks lost|0 stored"):
        cache.footprint(llm, FULL, 300, quiet)


def test_a_text_with_learned_positions_ends_where_they_do(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.room(llm, 4000) == 4000 and cache.room(llm, 0) == 0
    for learned, most in ((1024, 1023), (128, 0)):
        monkeypatch.setattr(llm.runner, "spec", dataclasses.replace(llm.runner.spec, learned_positions=learned))
        assert cache.room(llm, 4000) == most
    assert cache.room(llm, 500) == 0


# ---- the report


def result(full: Any, control: Any = None, retrieval: bool = True, **runs: Any) -> Result:
    """Scores by item; runs: "policy_50" -> log-probabilities."""
    probes = [Probe(i, [0] * 10, 2, (Answer(0, 2, 10),)) for i in range(len(full))]
    task = Task("key-value" if retrieval else "text", ("turn 1",), probes, probes if retrieval else [], 0.25)

    def scores(logprobs: Any) -> Scores:
        return Scores(np.array(logprobs, float)[:, None], np.zeros((len(full), 1)))

    chosen = []
    for name, logprobs in runs.items():
        policy, _, budget = name.partition("_")
        chosen.append((PolicyAtBudget(policy, float(budget) if budget else None, 5, {"keep": policy}, None, policy), scores(logprobs)))
    return Result(task, scores(full), None if control is None else scores(control), chosen)


FLAT = [-2.0, -2.2, -1.8, -2.0] * 3
NOISE = np.array([0.3, -0.3, 0.2, -0.2] * 3)


def findings(one: Result) -> str:
    return "\n".join(curves.findings(Measured([one], []), CacheOptions(("keep=newest",))))


def test_a_model_that_does_not_retrieve_is_called_that() -> None:
    blind = findings(result(FLAT, np.array(FLAT) + NOISE, newest_50=np.array(FLAT) - 1))
    assert "shows nothing about retrieval" in blind and "accuracy 0.0%, 25.0% by chance" in blind
    seeing = findings(result(FLAT, np.array(FLAT) - 1 + NOISE, newest_50=np.array(FLAT) - 1))
    assert "shows nothing" not in seeing and "with its whole cache the model uses the context: an answer gains +1.00" in seeing


def test_differences_within_the_spread_are_named_and_others_are_not() -> None:
    reported = findings(
        result(
            FLAT,
            retrieval=False,
            hidden_50=FLAT + NOISE,
            hidden_25=FLAT + NOISE,
            worse_50=np.array(FLAT) - 0.5,
            better=np.array(FLAT) + 0.1,
        )
    )
    assert "no difference to the whole cache beyond the spread over 12 texts: hidden at 50, 25 %\n" in reported
    assert "better than the whole cache: better\n" in reported and "worse" not in reported


def test_a_budget_of_everything_must_change_nothing() -> None:
    reported = findings(result(FLAT, retrieval=False, same_100=FLAT, other_100=np.array(FLAT) + 1e-6))
    assert "at 100 % the same scores as the whole cache: same\n" in reported
    assert "at 100 % other scores than the whole cache: other (by 1.0e-06 nats a token at most)" in reported
    assert "beyond the spread" not in reported


def test_few_texts_are_no_ground_for_spreads() -> None:
    assert "too narrow to be trusted" in findings(result(FLAT[:4], retrieval=False))
    assert "too narrow" not in findings(result(FLAT, retrieval=False))


def test_what_was_not_measured_is_listed_with_its_needs() -> None:
    reported = findings(result(FLAT, retrieval=False))
    for seam in ("keep", "codec", "read", "depth"):
        for name in registry.METHODS[seam]:
            card = cast(Any, registry.method(seam, name)).card
            named = f"{seam}={name}" + (f" (needs: {card.needs})" if card.needs != NOTHING else "")
            assert (re.search(rf"[,:] {re.escape(named)}(,|$)", reported, re.MULTILINE) is not None) == (name != "newest")


def test_spreads() -> None:
    same = bootstrap(np.full(9, 0.5))
    assert same == (0.5, 0.5, 0.5) and same.visible and not bootstrap(np.zeros(9)).visible
    spread = bootstrap(NOISE)
    assert spread.low < 0 < spread.high and not spread.visible and spread == bootstrap(NOISE)
    assert spread.high - spread.low == pytest.approx(2 * 1.96 * NOISE.std() / np.sqrt(len(NOISE)), rel=0.1)
    assert bootstrap(NOISE + 1).visible and bootstrap(NOISE - 1).visible


@pytest.fixture
def measured() -> Measured:
    retrieval = result(FLAT, np.array(FLAT) - 1, newest_100=FLAT, newest_50=np.array(FLAT) - 0.5, newest_25=np.array(FLAT) - 1)
    running = result(FLAT, retrieval=False, newest_50=np.array(FLAT) - 0.1, ruin_50=np.array(FLAT) - 3)
    prints = [
        Footprint(FULL, 400, 1 << 20, 1 << 19, 64, 0.04),
        Footprint(PolicyAtBudget("newest", 25.0, 100, {}), 400, 1 << 18, 1 << 18, 128, 0.02),
    ]
    return Measured([retrieval, running], prints, {"newest": {10.0: "newest:budget=5: must be 32 or more"}})


def test_tables(llm: LLM, measured: Measured) -> None:
    out = StringIO()
    curves.show(Console(file=out, width=80), llm, CacheOptions(("keep=newest",)), measured)
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "newest 50 %, 5 0.0% -2.50 -0.50 (-0.50 to -0.50)" in lines and "newest 50 % -2.50" in lines
    assert "newest 50 %, 5 8.166 +10.5% (+10.5% to +10.5%)" in lines and "newest 50 % 8.166" in lines
    assert lines.count("full 7.389") == 2 and "\N{HORIZONTAL ELLIPSIS}" not in out.getvalue()
    assert "newest 25 % 256 KiB 256 KiB 50% 128 20.0 2.00" in lines
    assert any("refused and left out: newest at 10 %: newest:budget=5" in line for line in lines)


def test_json_holds_every_curve(llm: LLM, measured: Measured) -> None:
    found = json.loads(json.dumps(curves.document(llm, CacheOptions(("keep=newest",)), measured, {"seed": 0}), allow_nan=False))
    first, second = found["tasks"]
    assert [(row["policy"], row["budget"]) for row in first["rows"]] == [("full", None), ("newest", 100), ("newest", 50), ("newest", 25)]
    assert first["gain_of_context"]["mean"] == pytest.approx(1) and second["gain_of_context"] is None
    row = first["rows"][2]
    assert row["difference"]["mean"] == pytest.approx(-0.5) and row["places"]["turn 1"]["logprob"] == pytest.approx(-2.5)
    assert row["perplexity"] is None and second["rows"][0]["perplexity"] == pytest.approx(np.exp(2))
    assert [(one["policy"], one["peak_bytes"], one["tokens_beside"]) for one in found["memory"]] == [
        ("full", 1 << 20, 64),
        ("newest", 1 << 18, 128),
    ]
    assert found["findings"] and found["settings"]["policies"] == ["keep=newest"]


def test_curves_are_kept_for_later_choices(llm: LLM, measured: Measured) -> None:
    found = curves.kept(llm, measured)
    assert (found.model, found.dtype, found.texts) == (model_hash(llm.runner), "float64", 12)
    assert found.right == {"key-value": 0.0} and found.chance == {"key-value": 0.25}
    by_budget = {(one.policy, one.budget): one for one in found.curves}
    half, quarter = by_budget["newest", 50.0], by_budget["newest", 25.0]
    assert (half.bytes, half.speed, quarter.bytes, quarter.speed) == (None, None, 0.5, 2.0)
    assert half.loss["text"].nats.mean == pytest.approx(0.1) and half.loss["text"].right is None
    assert half.loss["key-value"].nats.mean == pytest.approx(0.5)
    assert quarter.loss["key-value"].right == (0.0, 0.0, 0.0)


def test_the_table_has_a_line_for_each_budget(measured: Measured) -> None:
    lines = curves.markdown(measured).splitlines()
    assert lines[2:4] == [
        "| whole cache |  | 100 % | 1.00 | 0% | 7.389 |",
        "| newest | 100 % | - | - | 0%, +0.00 (+0.00 to +0.00) | - |",
    ]
    assert "| newest | 25 % | 50% | 2.00 | 0%, -1.00 (-1.00 to -1.00) | - |" in lines and len(lines) == 7


def test_the_figure_has_a_labelled_panel_for_each_measure(measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, dpi: drawn.append(self))
    curves.plot(tmp_path / "a.png", "title", measured)
    (one,) = drawn
    panels = [axis for axis in one.axes if axis.axison]
    assert len(panels) == 7 and all(axis.get_xlabel() and axis.get_title() for axis in panels)
    assert [axis.get_ylabel() for axis in panels[:4]] == [
        "log-probability of the answer", "accuracy", "log-probability less the whole cache's", "perplexity",
    ]  # fmt: skip
    (legend,) = one.legends
    assert {text.get_text() for text in legend.get_texts()} == {"whole cache", "newest", "ruin"}
    (curve,) = panels[0].containers
    assert curve[0].get_xydata().round(3).tolist() == [[25, -3], [50, -2.5], [100, -2]]
    assert panels[3].get_ylim()[1] < 12, "a policy that ruins the text must not flatten the others"
