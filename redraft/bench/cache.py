"""Quality and memory of cache policies, on texts scored token by token.

A policy is compared with the full cache on the same texts, by the log-probabilities of the right tokens. Rows of a text's context count
as given and later rows as generated, so one pass scores a text as if it were generated token by token. A budget is a part of the
longest text of a task, in tokens. Spreads are bootstraps over texts (95 %) of differences on the same texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from redraft import registry
from redraft.bench.tasks import Probe, Task
from redraft.config import EngineConfig, SamplingParams
from redraft.core.sequence import Request, Wants
from redraft.engine.budgets import Policy, budgeted, registered
from redraft.engine.curves import Interval
from redraft.engine.engine import Engine
from redraft.engine.output import checked
from redraft.errors import InvalidInput, RedraftError
from redraft.llm import LLM
from redraft.models.runner import Runner
from redraft.ops.backend import Feature
from redraft.ops.format import plain

F64 = NDArray[np.float64]
Tick = Callable[[str], None]  # called after each group of texts
Refused = dict[str, dict[float | None, str]]  # policy -> budget -> why it was refused in at least one task

BUDGETS = (50.0, 25.0, 10.0, 5.0)
DRAWS = 2000
LAST = 96  # tokens that a text has written, and has to write, when the neighbour arrives
PATTERN = "def name(self, other):\n    return "
REPLY = 16  # tokens that the neighbour writes
CHECKED = 32  # steps between two checks of the table


@dataclass(frozen=True)
class CacheOptions:
    """What is measured and how. policies: "seam=name:option=value,...", joined by + if a request chooses several; one of NUMBERS in
    braces stands for the budget; empty: all registered ones that this model supports. budgets: percent; batch: texts scored at once;
    memory: tokens of the text whose cache and steps are measured, 0 for none."""

    policies: tuple[str, ...] = ()
    budgets: tuple[float, ...] = BUDGETS
    batch: int = 8
    memory: int = 2000

    def __post_init__(self) -> None:
        """Raises InvalidInput (UnknownMethod) before anything is loaded."""
        for budget in self.budgets:
            if not 0 < budget <= 100:
                raise InvalidInput(f"budget = {budget:g}: percent above 0 and up to 100 are allowed")
        if self.batch < 1:
            raise InvalidInput(f"batch = {self.batch}: must be 1 or more")
        if self.memory < 0 or 0 < self.memory <= 2 * LAST:
            raise InvalidInput(f"memory = {self.memory}: must be 0 or more than {2 * LAST}")
        for text in self.policies:
            Policy.of(text)

    @property
    def chosen(self) -> list[Policy]:
        return [Policy.of(text) for text in self.policies] if self.policies else registered()


class PolicyAtBudget(NamedTuple):
    """A policy at a budget. budget: percent, None if the policy takes none; params: fields of SamplingParams; share: bytes of a token
    relative to the full cache, if it has a codec; text: the policy with places for its budget."""

    policy: str
    budget: float | None
    tokens: int | None
    params: dict[str, str]
    share: float | None = None
    text: str = ""

    @property
    def label(self) -> str:
        return self.policy if self.budget is None else f"{self.policy} at {self.budget:g} %"


FULL = PolicyAtBudget("full", None, None, {})


class Scores(NamedTuple):
    """f64[items, places]: mean log-probability of an answer's tokens, and 1 if greedy decoding writes the answer, else 0."""

    logprobs: F64
    right: F64


@dataclass(frozen=True)
class Result:
    """The scores of one task: with the full cache, with the full cache on the control contexts (None for running text), and of each
    policy."""

    task: Task
    full: Scores
    control: Scores | None
    runs: list[tuple[PolicyAtBudget, Scores]]

    def difference(self, scores: Scores) -> Interval:
        """Mean log-probability minus that of the full cache."""
        return bootstrap((scores.logprobs - self.full.logprobs).mean(1))

    @property
    def retrieves(self) -> Interval | None:
        """How much likelier an answer is, with the full cache, because the context states it. None for running text."""
        return None if self.control is None else bootstrap((self.full.logprobs - self.control.logprobs).mean(1))


@dataclass(frozen=True)
class Footprint:
    """Cache of one text. peak: most bytes; steady: mean bytes while it is written; beside: tokens of another request that ran at the same
    time in the remaining pages; seconds: of a processor, for one written token."""

    choice: PolicyAtBudget
    tokens: int
    peak: int
    steady: int
    beside: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    results: list[Result]
    footprints: list[Footprint]
    refused: Refused = field(default_factory=dict)


@dataclass(frozen=True)
class RunPlan:
    """All that will run. tokens: length of the text whose cache `footprints` measures."""

    runs: list[tuple[Task, list[PolicyAtBudget]]]
    footprints: list[PolicyAtBudget]
    tokens: int
    batch: int
    refused: Refused

    @classmethod
    def of(cls, llm: LLM, options: CacheOptions, tasks: Seq[Task]) -> RunPlan:
        """Raises the error of a refused policy that the user named, before anything is measured."""
        refused: Refused = {}
        runs = [(task, choices(llm, options, task.longest, refused)) for task in tasks]
        tokens = room(llm, options.memory)
        footprints = [FULL, *choices(llm, options, tokens, refused)] if tokens else []
        return cls(runs, footprints, tokens, options.batch, refused)

    @property
    def ticks(self) -> int:
        """How often `measure` calls `tick`."""
        scored = [len(task.probes) for task, chosen in self.runs for _ in range(1 + len(chosen))]
        scored += [len(task.controls) for task, _ in self.runs]
        return sum(-(-probes // self.batch) for probes in scored) + len(self.footprints)


def load(config: EngineConfig) -> LLM:
    """The model. It shares prefixes if a policy then gives the same bits, which is not so where a row depends on those beside it."""
    llm = LLM(config=config)
    if Feature.BIT_EXACT in llm.runner.backend.features:
        return llm
    del llm
    return LLM(config=config.but(cache=config.cache.but(prefix_sharing=False)))


def measure(llm: LLM, plan: RunPlan, tick: Tick = lambda what: None) -> Measured:
    """Runs it. `llm` has no drafter. If it shares prefixes, a context is read once for all questions and policies that
    may begin with pages of the whole cache."""
    results = []
    for task, chosen in plan.runs:
        full, *scores = score_all(llm, task, task.probes, [FULL, *chosen], plan.batch, tick)
        control = score(llm, task, task.controls, FULL, plan.batch, tick) if task.retrieval else None
        results.append(Result(task, full, control, [*zip(chosen, scores, strict=True)]))
    footprints = []
    for choice in plan.footprints:
        try:
            footprints.append(footprint(llm, choice, plan.tokens, tick))
        except RedraftError as error:  # what was measured before is not lost
            plan.refused.setdefault(choice.policy, {}).setdefault(choice.budget, str(error))
    return Measured(results, footprints, plan.refused)


def choices(llm: LLM, options: CacheOptions, tokens: int, refused: Refused) -> list[PolicyAtBudget]:
    """All policies at all budgets of a text of `tokens` tokens. Policies and budgets that this model refuses
    go to `refused`. If all budgets of a policy that the user named are refused, the error is raised."""
    found: list[PolicyAtBudget] = []
    for policy in options.chosen:
        before, error = len(found), None
        for budget in options.budgets if policy.places else (None,):
            params = policy.at(budget or 100, tokens)
            try:
                llm.engine.policies.check(SamplingParams(**params))
            except RedraftError as raised:
                error = raised
                refused.setdefault(policy.name, {}).setdefault(budget, str(raised))
                continue
            held = None if budget is None else budgeted(budget, tokens)
            found.append(PolicyAtBudget(policy.name, budget, held, params, stored(llm, params), policy.text))
        if options.policies and error is not None and len(found) == before:
            raise error
    return found


def stored(llm: LLM, params: dict[str, str]) -> float | None:
    """Bytes that a codec takes for an encoded token, relative to the exact ones."""
    if params.get("codec") is None:
        return None
    codec = registry.create("codec", params["codec"]).open(llm.runner)
    exact = plain(llm.runner.backend.dtype, llm.runner.spec.head_dim)
    held, whole = (sum(array.bytes for array in arrays.values()) for arrays in (codec.arrays, exact))
    return float(held / whole)


# ---- quality


def score(llm: LLM, task: Task, probes: Seq[Probe], choice: PolicyAtBudget, batch: int, tick: Tick) -> Scores:
    return score_all(llm, task, probes, [choice], batch, tick)[0]


def score_all(llm: LLM, task: Task, probes: Seq[Probe], chosen: Seq[PolicyAtBudget], batch: int, tick: Tick) -> list[Scores]:
    """Scores every answer of every probe under each choice. An answer is right if each of its tokens is the likeliest after the tokens
    before it, which means that greedy decoding writes it. All choices score a group of `batch` probes before the next group."""
    found = [Scores(*(np.full((task.items, len(task.places)), np.nan) for _ in range(2))) for _ in chosen]
    for at in range(0, len(probes), batch):
        group = probes[at : at + batch]
        if llm.config.cache.prefix_sharing:
            read(llm, group)
        for choice, scores in zip(chosen, found, strict=True):
            _score(llm, task, group, choice, scores)
            tick(f"{task.name}: {choice.label}")
    assert not any(np.isnan(scores.logprobs).any() for scores in found), f"{task.name}: an item lacks an answer at some place"
    return found


def read(llm: LLM, group: Seq[Probe]) -> None:
    """Puts the contexts of these probes into the prefix cache."""
    contexts = {tuple(probe.ids[: probe.context]) for probe in group}
    llm.generate([{"prompt_token_ids": list(ids)} for ids in contexts], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))


def _score(llm: LLM, task: Task, group: Seq[Probe], choice: PolicyAtBudget, scores: Scores) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0, **choice.params)
    wants = [Wants(logprobs_of=[at for _, first, last in probe.answers for at in range(first, last)]) for probe in group]
    given = [{"prompt_token_ids": probe.ids, "context": probe.context, "wants": one} for probe, one in zip(group, wants, strict=True)]
    outputs = llm.generate(given, params)
    for probe, output in zip(group, outputs, strict=True):
        if output.error is not None or output.prompt_logprobs is None:
            raise InvalidInput(f"{task.name}, {choice.label}: {output.error}")
        for place, first, last in probe.answers:
            entries = [one for one in output.prompt_logprobs[first:last] if one is not None]
            assert len(entries) == last - first
            scores.logprobs[probe.item, place] = np.mean([one.logprob for one in entries])
            scores.right[probe.item, place] = all(one.rank == 1 for one in entries)


def bootstrap(values: F64) -> Interval:
    """The bootstrap interval of values[items], with the same draws at each call."""
    drawn = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


# ---- memory


def room(llm: LLM, tokens: int) -> int:
    """Tokens that a text may have, 0 if they are too few to measure. Only learned positions limit it: after the trained context a text
    makes little sense, but takes as much memory."""
    learned = llm.runner.spec.learned_positions
    length = tokens if learned is None else min(tokens, learned - 1)
    return length if length > 2 * LAST else 0


def footprint(llm: LLM, choice: PolicyAtBudget, tokens: int, tick: Tick) -> Footprint:
    """Reads and writes a text of `tokens` tokens in its own pool, which has room for two and a half such texts with the full cache. Its
    last 2 * LAST tokens are written; when half of these are left, another request with the full cache arrives, which needs half of the
    free pages. AssertionError if the page table is inconsistent."""
    prompt = (llm.tokenizer.encode(PATTERN) * tokens)[: tokens - 2 * LAST]
    params = SamplingParams(temperature=0, max_tokens=2 * LAST, ignore_eos=True, **choice.params)
    text, blocks = Request("text", prompt, params), 5 * -(-tokens // llm.runner.memory.paged.table.page) // 2 + 1
    engine = pool(llm, tokens, blocks)
    engine.add(text)
    table, block_bytes = engine.memory.paged.table, engine.memory.paged.store.block_bytes
    used, seconds = [0], [0.0]
    while text.sequences[0].generated < LAST:
        began, writes = time.process_time(), text.sequences[0].generated > 0
        checked(engine.step())
        if writes:
            used.append(table.used())
            seconds.append(time.process_time() - began)
        if len(used) % CHECKED == 0:
            table.check()
    peak, steady, step = table.peak, float(np.mean(used[1:])), float(np.median(seconds[1:]))
    beside = neighbour(engine, prompt, min(table.available() // 2 * table.page, tokens - 1) - REPLY)
    table.check()
    tick(f"memory: {choice.label}")
    return Footprint(choice, tokens, peak * block_bytes, round(steady * block_bytes), beside, step)


def neighbour(engine: Engine, prompt: list[int], count: int) -> int:
    """Runs all to the end, with another request of `count` tokens that writes REPLY more. Returns the tokens of that request if it
    finished before the other text, 0 if it had to wait for pages."""
    if count > 0:
        params = SamplingParams(temperature=0, max_tokens=REPLY, ignore_eos=True)
        engine.add(Request("neighbour", (prompt * count)[:count], params))
    beside = 0
    while engine.has_work:
        for event in checked(engine.step()):
            if event.request.id == "neighbour" and event.reason is not None and engine.running:
                beside = count + REPLY
        engine.memory.check()
    return beside


def pool(llm: LLM, tokens: int, blocks: int) -> Engine:
    """An engine over the same weights, for texts of `tokens` tokens, with its own cache."""
    own, engine = llm.runner, llm.engine
    runner = Runner(own.spec, own.weights, own.backend, blocks, sharing=False, source=own.source)
    drafter: Any = registry.create("draft", "none").open(runner, engine.sampler)
    return Engine(runner, engine.scheduler, drafter, engine.verifier.own, engine.sampler, max_model_len=tokens)
