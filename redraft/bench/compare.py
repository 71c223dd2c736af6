"""The plain loop and every method on the same prompts, in one process, interleaved and repeated.

`llm.generate` of a group of prompts is timed, from admission to the last token, so reading the prompt counts for all methods. Generation
alone is timed too: from the step that draws the last first token of the group to the last step.

What a drafter learned from texts is restored before every measurement, so no round replays what an earlier round taught it. `cold` is the
state it opens with, `hot` what it learned on other prompts: each category is split into two halves, and the state for one half was learned
on the other half only. With warm prompts there is `warm` in place of `hot`: what it learned on those, which are not measured. Times of
steps are not restored, because they are facts of the machine.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import zip_longest
from typing import Any

from redraft import registry
from redraft.bench.estimate import Pace, Work
from redraft.bench.gauge import Share, measured
from redraft.bench.prompts import Prompt
from redraft.config import SamplingParams
from redraft.core.noise import sample_seed
from redraft.errors import InvalidInput, PromptTooLong, RedraftError
from redraft.llm import LLM
from redraft.models.tokenizer import Tokenizer

BASELINE = "none"
WARM_UP = 8  # tokens that each method generates before it is measured

Tick = Callable[[str], None]  # called after each group, timed or not


class Mode(StrEnum):
    """The state of a drafter when a measurement starts."""

    BASELINE = "baseline"
    COLD = "cold"
    HOT = "hot"
    WARM = "warm"
    SAME = "cold=hot"  # it learns nothing from traffic


@dataclass(frozen=True)
class CompareOptions:
    """What is compared and how. drafts: methods as "name:option=value,..."; batch: prompts that run at once; lenient: methods
    that do not fit this model or verifier are left out and named, instead of refused; bound: also measure, in an untimed pass, the
    acceptance relative to that of the best possible rule; warm: prompts that drafters learn from before, without being timed."""

    drafts: tuple[str, ...]
    params: SamplingParams
    rounds: int = 3
    batch: int = 1
    lenient: bool = False
    bound: bool = False
    warm: tuple[Prompt, ...] = ()

    def __post_init__(self) -> None:
        """Raises InvalidInput (UnknownMethod) before anything is loaded."""
        for name in ("rounds", "batch"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} = {getattr(self, name)}: must be 1 or more")
        if not self.drafts:
            raise InvalidInput(f"draft: name at least one method; known: {', '.join(sorted(registry.METHODS['draft']))}")
        for draft in self.drafts:
            if self.drafts.count(draft) > 1:
                raise InvalidInput(f"draft = {draft!r} is given more than once")
            registry.create("draft", draft)
        if BASELINE in self.drafts:
            raise InvalidInput(f"draft = {BASELINE!r} is the plain loop, which is always measured as the baseline")


@dataclass(frozen=True)
class PromptGroup:
    """Prompts of one category and one half that run at the same time. Each measurement runs one group."""

    category: str
    half: int
    prompts: tuple[Prompt, ...]
    params: tuple[SamplingParams, ...]


@dataclass(frozen=True, eq=False)
class Entry:
    """A method and the state it starts with, which is given for each half of the suite."""

    method: str
    mode: Mode
    llm: LLM
    states: tuple[Any, Any]


@dataclass(frozen=True)
class Turn:
    """The tokens that the model read and wrote."""

    prompt: list[int]
    tokens: list[int]


@dataclass
class Run:
    """One measurement: a group's conversations with one entry. generated, generating: the tokens after the step that drew the last
    first token, and their seconds; peak: most bytes of cache in use, including a draft model's; fault: the error of the first drafter
    that failed."""

    conversations: list[list[Turn]]
    seconds: float = 0.0
    generated: int = 0
    generating: float = 0.0
    steps: int = 0
    accepted: int = 0
    peak: int = 0
    fault: str = ""
    by_depth: list[int] = field(default_factory=list)  # [i]: passes that kept i + 1 nodes or more
    by_drafter: Counter[str] = field(default_factory=Counter)  # nodes kept of each drafter
    drafted: int = 0
    stopped: Counter[str] = field(default_factory=Counter)  # passes that a drafter did not draft for, because it did not pay

    @property
    def tokens(self) -> int:
        return sum(len(turn.tokens) for turns in self.conversations for turn in turns)

    @property
    def work(self) -> Work:
        read = sum(len(turn.prompt) for turns in self.conversations for turn in turns)
        return Work(read, max((sum(len(turn.tokens) for turn in turns) for turns in self.conversations), default=0))


@dataclass(frozen=True)
class Comparison:
    """All measurements: runs[entry][round][group]; entry 0 is the plain loop."""

    entries: list[Entry]
    groups: list[PromptGroup]
    runs: list[list[list[Run]]]
    left_out: list[str]  # ids of prompts that do not fit the context
    cut_short: list[str]  # ids of conversations that exceeded the context after the first turn
    refused: list[str] = field(default_factory=list)  # methods left out, each with the reason
    bounds: dict[int, Share] = field(default_factory=dict)  # entry -> acceptance over its bound, if there is a bound
    stopped: bool = False  # by Ctrl-C, before the last round or the bounds

    @property
    def rounds(self) -> int:
        return len(self.runs[0])

    @property
    def outputs(self) -> int:
        return sum(len(group.prompts) for group in self.groups)


class Dialogue:
    """The input of the model: text to continue, or a chat by the checkpoint's template. Without a template, the contents of the
    messages, one on each line."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.text = prompt.prompt
        self.messages = list(prompt.messages or [])
        self.turns = list(prompt.turns or [])
        self.open = True
        self._next_turn()

    def _next_turn(self) -> None:
        if self.turns:
            self.messages.append({"role": "user", "content": self.turns.pop(0)})

    def ids(self) -> list[int]:
        """The tokens that the model reads next, earlier turns included."""
        if self.text is not None:
            return self.tokenizer.encode(self.text)
        if has_template(self.tokenizer):
            return self.tokenizer.encode_chat(self.messages)
        return self.tokenizer.encode("\n".join(message["content"] for message in self.messages))

    def reply(self, tokens: list[int]) -> None:
        """Appends the model's answer and the next turn, if there is one."""
        self.open = bool(self.turns)
        self.messages.append({"role": "assistant", "content": self.tokenizer.decode(tokens)})
        self._next_turn()


def has_template(tokenizer: Tokenizer) -> bool:
    return bool(tokenizer.has_template)


def compare(
    llm: LLM,
    options: CompareOptions,
    prompts: Seq[Prompt],
    tick: Tick = lambda what: None,
    announce: Callable[[float], None] = lambda seconds: None,
) -> Comparison:
    """Runs everything. `llm` is the plain loop, loaded with prefix_sharing=False; the methods are its siblings.

    announce: receives the estimated duration in seconds before anything is measured. Ctrl-C ends the measurements, and the results so
    far are returned. Raises KeyboardInterrupt if there are none.
    """
    fits = [prompt for prompt in prompts if len(Dialogue(prompt, llm.tokenizer).ids()) < llm.max_model_len]
    if not fits:
        raise PromptTooLong(f"none of the {len(prompts)} prompts fits the context: max_model_len = {llm.max_model_len}")
    params = llm.params(options.params)
    llm.engine.policies.check(params)  # raises once what the engine would refuse for every prompt
    groups, warm = split(fits, options.batch, params), warming(llm, options, prompts)
    siblings, refused = opened(llm, options)
    announce(estimate([llm, *siblings.values()], groups, options, warm))
    entries = [Entry(BASELINE, Mode.BASELINE, llm, (None, None))]
    for draft, sibling in siblings.items():
        entries += enter(draft, sibling, groups, tick, warm)
    runs, stopped = measure_all(entries, groups, options.rounds, tick)
    groups = groups[: len(runs[0][0])]
    bounds: dict[int, Share] = {}
    if options.bound and not stopped:
        bounds, stopped = gauge_all(entries, groups, runs)
    left_out = [prompt.id for prompt in prompts if prompt not in fits]
    return Comparison(entries, groups, runs, left_out, cut_short(groups, runs[0][0]), refused, bounds, stopped)


def warming(llm: LLM, options: CompareOptions, prompts: Seq[Prompt]) -> list[PromptGroup]:
    """The groups of the warm prompts that fit the context. InvalidInput if none does, or if one of them is measured too."""
    measured = {prompt.content for prompt in prompts}
    if same := [prompt.id for prompt in options.warm if prompt.content in measured]:
        raise InvalidInput(f"warm: {', '.join(same)} is also measured; a drafter must not learn what it is measured on")
    fits = [prompt for prompt in options.warm if len(Dialogue(prompt, llm.tokenizer).ids()) < llm.max_model_len]
    if options.warm and not fits:
        raise PromptTooLong(f"warm: none of the {len(options.warm)} prompts fits the context: max_model_len = {llm.max_model_len}")
    return split(fits, options.batch, llm.params(options.params))


def opened(llm: LLM, options: CompareOptions) -> tuple[dict[str, LLM], list[str]]:
    """(draft -> an engine with it, refused draft -> the reason)."""
    siblings, refused = {}, []
    for draft in options.drafts:
        try:
            siblings[draft] = llm.sibling(draft=draft)
        except RedraftError as error:
            if not options.lenient:
                raise
            refused.append(f"{draft}: {error}")
    return siblings, refused


def estimate(llms: Seq[LLM], groups: Seq[PromptGroup], options: CompareOptions, warm: Seq[PromptGroup] = ()) -> float:
    """Seconds that the measurements will take: the time of a short run of each engine, scaled to the tokens of all groups."""
    work = sum((expected(llms[0], group) for group in groups), Work(0, 0))
    lessons = sum((expected(llms[0], group) for group in warm), Work(0, 0)) if warm else work
    seconds = 0.0
    for i, llm in enumerate(llms):
        learns = i > 0 and llm.engine.drafter.snapshot() is not None and (bool(warm) or len({group.half for group in groups}) > 1)
        bounded = i > 0 and options.bound and not groups[0].params[0].greedy
        speed = pace(llm, groups[0])
        seconds += (1 + learns) * (options.rounds + bounded) * speed.seconds(work) + learns * speed.seconds(lessons)
    return seconds


def expected(llm: LLM, group: PromptGroup) -> Work:
    """The tokens of a group if every text has its maximum length."""
    read, written = 0, 0
    for prompt, params in zip(group.prompts, group.params, strict=True):
        length, total = len(Dialogue(prompt, llm.tokenizer).ids()), 0
        for turn in [*(prompt.turns or [""])[1:], ""]:
            new = min(params.max_tokens or llm.max_model_len, max(0, llm.max_model_len - length))
            read, total = read + length, total + new
            length = min(llm.max_model_len, length + new + len(llm.tokenizer.encode(turn)))
        written = max(written, total)
    return Work(read, written)


def pace(llm: LLM, group: PromptGroup) -> Pace:
    """Measured by two short runs of a group, after a first one that is not timed. What a drafter learns is dropped."""
    state = llm.engine.drafter.snapshot()
    generate(llm, shortened(group, WARM_UP, 1))
    llm.calibrate()
    restore(llm, state)
    short = generate(llm, shortened(group, 1))
    restore(llm, state)
    long = generate(llm, shortened(group, 1 + WARM_UP))
    restore(llm, state)
    return Pace.of(short.work, short.seconds, long.work, long.seconds)


def shortened(group: PromptGroup, tokens: int, prompts: int | None = None) -> PromptGroup:
    """The group's first `prompts` prompts with at most `tokens` new tokens."""
    params = tuple(params.but(max_tokens=tokens, min_tokens=0) for params in group.params)
    return PromptGroup(group.category, group.half, group.prompts[:prompts], params[:prompts])


def measure_all(entries: Seq[Entry], groups: Seq[PromptGroup], rounds: int, tick: Tick) -> tuple[list[list[list[Run]]], bool]:
    """runs[entry][round][group], and whether Ctrl-C ended them early.

    Every round runs all entries on a group before the next group. The order of the entries rotates by one place from group to group
    and from round to round, and is reversed in every other round, so that changes of the machine's speed affect all entries alike.
    """
    runs: list[list[list[Run]]] = [[[] for _ in range(rounds)] for _ in entries]
    gc.collect()
    gc.freeze()  # the garbage collector then skips objects that exist already
    try:
        for turn in range(rounds):
            for g, group in enumerate(groups):
                for e in order(len(entries), turn, g):
                    runs[e][turn].append(measure(entries[e].llm, group, entries[e].states[group.half]))
                    tick(f"round {turn + 1}/{rounds}: {entries[e].method}")
    except KeyboardInterrupt:
        if not all(one[0] for one in runs):
            raise
        return comparable(runs, len(groups)), True
    finally:
        gc.unfreeze()
    return runs, False


def comparable(runs: list[list[list[Run]]], groups: int) -> list[list[list[Run]]]:
    """The rounds that all entries have finished. If there is none, the groups of the first round that all have finished."""
    common = [min(map(len, parts)) for parts in zip(*runs, strict=True)]
    rounds = max(1, common.count(groups))
    return [[part[: common[0]] for part in one[:rounds]] for one in runs]


def gauge_all(entries: Seq[Entry], groups: Seq[PromptGroup], runs: Seq[Seq[Seq[Run]]]) -> tuple[dict[int, Share], bool]:
    """(entry -> acceptance over its bound, by one more pass over all groups; whether Ctrl-C ended it early)."""
    found: dict[int, Share] = {}
    for e, entry in enumerate(entries):
        if entry.mode is Mode.BASELINE or groups[0].params[0].greedy:
            continue
        visits = sum(run.steps + run.accepted for run in runs[e][0])
        try:
            share = measured(entry.llm, visits, partial(run_all, entry, groups))
        except KeyboardInterrupt:
            return found, True
        if share is not None:
            found[e] = share
    return found, False


def run_all(entry: Entry, groups: Seq[PromptGroup]) -> list[Run]:
    return [measure(entry.llm, group, entry.states[group.half]) for group in groups]


def ticks(prompts: int, options: CompareOptions) -> int:
    """About how often `tick` is called, for a progress bar."""
    groups, lessons = -(-prompts // options.batch), -(-(len(options.warm) or prompts) // options.batch)
    return groups * options.rounds * (1 + 2 * len(options.drafts)) + lessons * len(options.drafts)


def split(prompts: Seq[Prompt], batch: int, params: SamplingParams) -> list[PromptGroup]:
    """Assigns prompts of each category to the halves in turn, then makes groups of at most `batch`. Each prompt has its own seed."""
    by_category: dict[str, list[tuple[Prompt, SamplingParams]]] = {}
    for i, prompt in enumerate(prompts):
        seed = sample_seed(params.seed or 0, i)
        by_category.setdefault(prompt.category, []).append((prompt, params.but(seed=seed)))
    groups, start = [], 0
    for category, members in by_category.items():
        for half in (0, 1):
            mine = members[(half - start) % 2 :: 2]
            for at in range(0, len(mine), batch):
                chosen, own = zip(*mine[at : at + batch], strict=True)
                groups.append(PromptGroup(category, half, chosen, own))
        start += len(members)  # the halves swap after an odd category, so that neither stays empty
    return groups


def order(entries: int, turn: int, group: int) -> list[int]:
    first = (turn + group) % entries
    turned = [*range(first, entries), *range(first)]
    return turned[::-1] if turn % 2 else turned


def enter(draft: str, llm: LLM, groups: Seq[PromptGroup], tick: Tick, warm: Seq[PromptGroup] = ()) -> list[Entry]:
    """A method's entries: cold, and hot or warm, if it learns from traffic, else one. Learning is not timed."""
    drafter = llm.engine.drafter
    empty = drafter.snapshot()
    if empty is None:
        return [Entry(draft, Mode.SAME, llm, (None, None))]
    cold = Entry(draft, Mode.COLD, llm, (empty, empty))

    def learned(lessons: Seq[PromptGroup]) -> Any:
        drafter.restore(empty)
        for group in lessons:
            generate(llm, group)
            tick(f"{draft} learns")
        return drafter.snapshot()

    if warm:
        state = learned(warm)
        return [cold, Entry(draft, Mode.WARM, llm, (state, state))]
    if len({group.half for group in groups}) < 2:
        return [cold]  # no other prompts to learn on
    first, second = (learned([group for group in groups if group.half != half]) for half in (0, 1))
    return [cold, Entry(draft, Mode.HOT, llm, (first, second))]


def measure(llm: LLM, group: PromptGroup, state: Any) -> Run:
    """One group from a known state, without pauses of the garbage collector."""
    restore(llm, state)
    gc.collect()
    gc.disable()
    try:
        return generate(llm, group)
    finally:
        gc.enable()


def restore(llm: LLM, state: Any) -> None:
    """state: None for a drafter that learns nothing."""
    if state is not None:
        llm.engine.drafter.restore(state)


def generate(llm: LLM, group: PromptGroup) -> Run:
    """The conversations of a group, all that are still open at once, turn after turn. Only generation is timed, not the
    preparation of the next turn."""
    dialogues = [Dialogue(prompt, llm.tokenizer) for prompt in group.prompts]
    run = Run([[] for _ in dialogues])
    runners = [llm.runner, *llm.runner.draft_models.values()]
    for runner in runners:
        runner.memory.paged.table.reset_peak()
    while active := [i for i, dialogue in enumerate(dialogues) if dialogue.open]:
        prompts = [dialogues[i].ids() for i in active]
        params = [group.params[i] for i in active]
        with steps(llm) as times:
            start = time.perf_counter()
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
            run.seconds += time.perf_counter() - start
        count, seconds = after_first(times)
        run.generated += count
        run.generating += seconds
        for i, ids, output in zip(active, prompts, outputs, strict=True):
            if output.error is not None and output.request is not None:  # it ended in the middle
                raise RedraftError(output.error)
            if output.error is not None:  # it no longer fits the context
                dialogues[i].open = False
                continue
            found = output.outputs[0]
            run.steps += found.stats.steps
            run.accepted += found.stats.accepted
            run.by_depth = [a + b for a, b in zip_longest(run.by_depth, found.stats.by_depth, fillvalue=0)]
            run.drafted += found.stats.drafted
            run.by_drafter.update({name: kept for name, (_, kept) in found.stats.by_drafter.items()})
            run.stopped.update(found.stats.stopped)
            run.fault = run.fault or found.stats.fault
            run.conversations[i].append(Turn(ids, found.token_ids))
            dialogues[i].reply(found.token_ids)
    run.peak = sum(runner.memory.paged.table.peak * runner.memory.paged.store.block_bytes for runner in runners)
    return run


Times = list[tuple[float, str, int]]
"""When a step ended, a text, and how many tokens the step gave it."""


@contextmanager
def steps(llm: LLM) -> Iterator[Times]:
    """Records the tokens of every step that `llm` makes inside."""
    found: Times = []
    engine, step = llm.engine, llm.engine.step

    def timed(*given: Any) -> Any:
        events = step(*given)
        if not given:  # else it is a part of a step that failed
            now = time.perf_counter()
            found.extend((now, event.request.id, len(event.tokens)) for event in events)
        return events

    vars(engine)["step"] = timed
    try:
        yield found
    finally:
        del vars(engine)["step"]


def after_first(times: Times) -> tuple[int, float]:
    """The tokens after the step on which all texts have their first one, and their seconds."""
    first: dict[str, float] = {}
    for now, text, _ in times:
        first.setdefault(text, now)
    began = max(first.values(), default=0.0)
    later = [(now, count) for now, _, count in times if now > began]
    return sum(count for _, count in later), later[-1][0] - began if later else 0.0


def cut_short(groups: Seq[PromptGroup], runs: Seq[Run]) -> list[str]:
    """Ids of the prompts whose plain run has fewer turns than the prompt."""
    return [
        prompt.id
        for group, run in zip(groups, runs, strict=True)
        for prompt, turns in zip(group.prompts, run.conversations, strict=True)
        if len(turns) < len(prompt.turns or [""])
    ]
