"""The plain loop and every method on the same prompts, in one process, interleaved and repeated.

What is timed is `llm.generate` of a group of prompts, from admission to the last token, so reading the prompt counts on
both sides. What a drafter learned from traffic is restored before every measurement: `cold` is the state it opens with,
`hot` what it learned on other prompts. The suite is cut in two halves within each category; the state that one half
meets was learned on the other half only.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

from redraft import registry
from redraft.bench.gauge import Share, measured
from redraft.bench.prompts import Prompt
from redraft.config import SamplingParams
from redraft.core.noise import sample_seed
from redraft.errors import InvalidInput, PromptTooLong, RedraftError
from redraft.llm import LLM
from redraft.models.tokenizer import Tokenizer

BASELINE = "none"
WARM_UP = 8  # tokens that each method generates before anything is timed

Tick = Callable[[str], None]  # told after each group that ran, timed or not


class Mode(StrEnum):
    """The state of a drafter when a measurement starts."""

    BASELINE = "baseline"
    COLD = "cold"
    HOT = "hot"
    SAME = "cold=hot"  # it learns nothing from traffic


@dataclass(frozen=True)
class Options:
    """What is compared and how. drafts: methods as "name:option=value,..."; batch: prompts that run at once; lenient:
    methods that this model or verifier cannot have are left out and named, instead of refused; bound: also how much of the
    most that any rule could accept was accepted, in an untimed pass."""

    drafts: tuple[str, ...]
    params: SamplingParams
    rounds: int = 3
    batch: int = 1
    lenient: bool = False
    bound: bool = False

    def __post_init__(self) -> None:
        """InvalidInput (UnknownMethod) before anything is loaded."""
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
            raise InvalidInput(f"draft = {BASELINE!r} is the plain loop, which every method is measured against anyway")


@dataclass(frozen=True)
class Group:
    """Prompts of one category and one half that run at the same time; a measurement is of one group."""

    category: str
    half: int
    prompts: tuple[Prompt, ...]
    params: tuple[SamplingParams, ...]


@dataclass(frozen=True, eq=False)
class Entry:
    """A method and the state it starts with, one for each half of the suite."""

    method: str
    mode: Mode
    llm: LLM
    states: tuple[Any, Any]


@dataclass(frozen=True)
class Turn:
    """What the model read and what it wrote."""

    prompt: list[int]
    tokens: list[int]


@dataclass
class Run:
    """One measurement: a group's conversations by one entry. peak: bytes of cache in use at most, a second model's too;
    fault: what the first drafter that failed said."""

    conversations: list[list[Turn]]
    seconds: float = 0.0
    steps: int = 0
    accepted: int = 0
    peak: int = 0
    fault: str = ""

    @property
    def tokens(self) -> int:
        return sum(len(turn.tokens) for turns in self.conversations for turn in turns)


@dataclass(frozen=True)
class Comparison:
    """All measurements: runs[entry][round][group]; entry 0 is the plain loop."""

    entries: list[Entry]
    groups: list[Group]
    runs: list[list[list[Run]]]
    left_out: list[str]  # ids of prompts that do not fit the context
    cut_short: list[str]  # ids of conversations that outgrew it after the first turn
    refused: list[str] = field(default_factory=list)  # methods left out, each with the reason
    bounds: dict[int, Share] = field(default_factory=dict)  # entry -> acceptance over its bound, where there is one


class Dialogue:
    """What is said to the model: text to continue, or a chat by the checkpoint's template. A checkpoint without a
    template reads a chat as its contents, one after the other, on lines of their own."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.text = prompt.prompt
        self.messages = list(prompt.messages or [])
        self.turns = list(prompt.turns or [])
        self.open = True
        self._ask()

    def _ask(self) -> None:
        if self.turns:
            self.messages.append({"role": "user", "content": self.turns.pop(0)})

    def ids(self) -> list[int]:
        """The tokens that the model reads next, all that was said before included."""
        if self.text is not None:
            return self.tokenizer.encode(self.text)
        if has_template(self.tokenizer):
            return self.tokenizer.encode_chat(self.messages)
        return self.tokenizer.encode("\n".join(message["content"] for message in self.messages))

    def reply(self, tokens: list[int]) -> None:
        """Appends the model's answer and the next turn, if there is one."""
        self.open = bool(self.turns)
        self.messages.append({"role": "assistant", "content": self.tokenizer.decode(tokens)})
        self._ask()


def has_template(tokenizer: Tokenizer) -> bool:
    return bool(tokenizer.hf.chat_template)


def compare(llm: LLM, options: Options, prompts: Seq[Prompt], tick: Tick = lambda what: None) -> Comparison:
    """Runs everything. `llm` is the plain loop, loaded with prefix_sharing=False; the methods are its siblings.

    Every round runs every group by every entry before the next group, in an order that turns by one place from group
    to group and from round to round and is reversed in every other round: what slows the machine down hits all alike.
    """
    fits = [prompt for prompt in prompts if len(Dialogue(prompt, llm.tokenizer).ids()) < llm.max_model_len]
    if not fits:
        raise PromptTooLong(f"none of the {len(prompts)} prompts fits the context: max_model_len = {llm.max_model_len}")
    llm.engine.policies.check(llm.params(options.params))  # what the engine would refuse for each prompt, once
    groups = split(fits, options.batch, llm.params(options.params))
    entries = [Entry(BASELINE, Mode.BASELINE, llm, (None, None))]
    refused = []
    for draft in options.drafts:
        try:
            twin = llm.sibling(draft=draft)
        except RedraftError as error:
            if not options.lenient:
                raise
            refused.append(f"{draft}: {error}")
            continue
        warm_up(twin, groups[0])
        entries += enter(draft, twin, groups, tick)
    warm_up(llm, groups[0])
    runs: list[list[list[Run]]] = [[[] for _ in range(options.rounds)] for _ in entries]
    gc.collect()
    gc.freeze()  # what lives already need not be looked through again before each measurement
    try:
        for turn in range(options.rounds):
            for g, group in enumerate(groups):
                for e in order(len(entries), turn, g):
                    runs[e][turn].append(measure(entries[e].llm, group, entries[e].states[group.half]))
                    tick(f"round {turn + 1}/{options.rounds}: {entries[e].method}")
    finally:
        gc.unfreeze()
    bounds = gauge_all(entries, groups, runs) if options.bound else {}
    left_out = [prompt.id for prompt in prompts if prompt not in fits]
    return Comparison(entries, groups, runs, left_out, cut_short(groups, runs[0][0]), refused, bounds)


def gauge_all(entries: Seq[Entry], groups: Seq[Group], runs: Seq[Seq[Seq[Run]]]) -> dict[int, Share]:
    """Entry -> acceptance over its bound, by one more pass over all groups."""
    found = {}
    for e, entry in enumerate(entries):
        if entry.mode is Mode.BASELINE or groups[0].params[0].greedy:
            continue
        visits = sum(run.steps + run.accepted for run in runs[e][0])
        share = measured(entry.llm, visits, partial(run_all, entry, groups))
        if share is not None:
            found[e] = share
    return found


def run_all(entry: Entry, groups: Seq[Group]) -> list[Run]:
    return [measure(entry.llm, group, entry.states[group.half]) for group in groups]


def ticks(prompts: int, options: Options) -> int:
    """About how often `tick` is called, for a progress bar."""
    groups = -(-prompts // options.batch)
    return groups * (options.rounds * (1 + 2 * len(options.drafts)) + len(options.drafts))


def split(prompts: Seq[Prompt], batch: int, params: SamplingParams) -> list[Group]:
    """Halves by turns within each category, then groups of at most `batch`. Each prompt gets a seed of its own."""
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
                groups.append(Group(category, half, chosen, own))
        start += len(members)  # an odd category hands its surplus on, so that neither half stays empty
    return groups


def order(entries: int, turn: int, group: int) -> list[int]:
    first = (turn + group) % entries
    turned = [*range(first, entries), *range(first)]
    return turned[::-1] if turn % 2 else turned


def enter(draft: str, llm: LLM, groups: Seq[Group], tick: Tick) -> list[Entry]:
    """A method's entries: cold and hot where it learns from traffic, else one. Learning is not timed."""
    drafter = llm.engine.drafter
    empty = drafter.snapshot()
    if empty is None:
        return [Entry(draft, Mode.SAME, llm, (None, None))]
    cold = Entry(draft, Mode.COLD, llm, (empty, empty))
    if len({group.half for group in groups}) < 2:
        return [cold]  # no other prompts to learn on
    learned = []
    for half in (0, 1):
        drafter.restore(empty)
        for group in groups:
            if group.half != half:
                generate(llm, group)
                tick(f"{draft} learns")
        learned.append(drafter.snapshot())
    return [cold, Entry(draft, Mode.HOT, llm, (learned[0], learned[1]))]


def warm_up(llm: LLM, group: Group) -> None:
    """A short run, so that nobody pays for first calls; nothing of it is kept."""
    state = llm.engine.drafter.snapshot()
    params = group.params[0].but(max_tokens=WARM_UP, min_tokens=0)
    generate(llm, Group(group.category, group.half, group.prompts[:1], (params,)))
    if state is not None:
        llm.engine.drafter.restore(state)


def measure(llm: LLM, group: Group, state: Any) -> Run:
    """One group from a known state, without pauses of the garbage collector."""
    if state is not None:
        llm.engine.drafter.restore(state)
    gc.collect()
    gc.disable()
    try:
        return generate(llm, group)
    finally:
        gc.enable()


def generate(llm: LLM, group: Group) -> Run:
    """The conversations of a group, all that are still open at once, turn after turn. Only generation is timed: what
    the next turn says is put together with the clock stopped."""
    dialogues = [Dialogue(prompt, llm.tokenizer) for prompt in group.prompts]
    run = Run([[] for _ in dialogues])
    runners = [llm.runner, *llm.runner.companions.values()]
    for runner in runners:
        runner.memory.paged.table.reset_peak()
    while active := [i for i, dialogue in enumerate(dialogues) if dialogue.open]:
        asked = [dialogues[i].ids() for i in active]
        params = [group.params[i] for i in active]
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], params)
        run.seconds += time.perf_counter() - start
        for i, ids, output in zip(active, asked, outputs, strict=True):
            if output.error is not None:  # it outgrew the context
                dialogues[i].open = False
                continue
            found = output.outputs[0]
            run.steps += found.stats.steps
            run.accepted += found.stats.accepted
            run.fault = run.fault or found.stats.fault
            run.conversations[i].append(Turn(ids, found.token_ids))
            dialogues[i].reply(found.token_ids)
    run.peak = sum(runner.memory.paged.table.peak * runner.memory.paged.store.slab_bytes for runner in runners)
    return run


def cut_short(groups: Seq[Group], runs: Seq[Run]) -> list[str]:
    """Ids of the prompts whose plain run has fewer turns than were asked for."""
    return [
        prompt.id
        for group, run in zip(groups, runs, strict=True)
        for prompt, turns in zip(group.prompts, run.conversations, strict=True)
        if len(turns) < len(prompt.turns or [""])
    ]
