"""What miniatures run on: models that are loaded once, prompts, and texts that were drafted, counted one by one."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redraft import LLM, SamplingParams
from redraft.bench import cache, prompts
from redraft.bench.compare import Dialogue
from redraft.bench.tasks import Task, Wanted, build, sources
from redraft.core.noise import sample_seed
from redraft.core.sequence import Request
from redraft.engine.output import checked

F64 = NDArray[np.float64]
ROOM, PAIR_ROOM = 320, 640  # tokens of the longest prompt; the model of the package is faster


@dataclass(frozen=True)
class Text:
    """One text. seconds: of a processor, from the first new token on."""

    ids: list[int]
    prompt: list[int]
    steps: int
    drafted: int
    accepted: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a step."""
        return len(self.ids) / self.steps


@dataclass
class Lab:
    """model: a folder; limit: samples, None for what a miniature chooses; seed: of everything that is drawn; heads: a folder with trained
    parts, each in a folder of the method's name."""

    model: str = "smollm2"
    limit: int | None = None
    seed: int = 0
    threads: int = 1
    heads: Path | None = None
    _runs: dict[Any, list[Text]] = field(default_factory=dict)

    def count(self, usual: int) -> int:
        return self.limit or usual

    @cached_property
    def folder(self) -> Path:
        """For files that drafters read. It is removed with the lab."""
        self._folder = tempfile.TemporaryDirectory(prefix="claims-")
        return Path(self._folder.name)

    @functools.cache  # noqa: B019
    def load(self, model: str | None = None, **options: Any) -> LLM:
        common = {"draft": "none", "threads": self.threads, "prefix_sharing": False, "max_seqs": 16, "token_budget": 512}
        return LLM(model or self.model, **{**common, **options})

    @property
    def llm(self) -> LLM:
        return self.load()

    @property
    def pair(self) -> LLM:
        """The model in the package with its draft model."""
        return self.load("embedded", draft_model="embedded-draft", dtype="float32", max_seqs=64)

    __hash__ = object.__hash__

    # ---- drafts

    def prompts(self, llm: LLM, usual: int, category: str | None = None) -> list[list[int]]:
        """Token ids of prompts of the suite, evenly from its categories."""
        chosen = prompts.load(None, [category] if category else None, None)
        ids = {one.id: Dialogue(one, llm.tokenizer).ids() for one in chosen}
        short = [
            one
            for one in chosen
            if len(ids[one.id]) <= min(PAIR_ROOM if llm.config.model.model == "embedded" else ROOM, llm.max_model_len // 2)
        ]
        by_turns = sorted(range(len(short)), key=lambda i: sum(short[i].category == one.category for one in short[:i]))
        return [ids[short[i].id] for i in by_turns[: self.count(usual)]]

    def texts(
        self,
        llm: LLM,
        draft: str,
        given: Seq[list[int]],
        *,
        learns: bool = False,
        tokens: int = 48,
        verify: str = "coupled",
        rows: int = 16,
        **params: Any,
    ) -> list[Text]:
        """The text after each prompt, one after the other. learns: a drafter keeps what it learned from the texts before."""  # fmt: skip
        key = (id(llm), draft, str(given), learns, tokens, verify, rows, str(params))
        if key not in self._runs:
            sibling = self.opened(llm, draft, verify, rows)
            state, found = sibling.engine.drafter.snapshot(), []
            for i, ids in enumerate(given):
                if not learns:
                    forget(sibling, state)
                found.append(self.text(sibling, ids, i, tokens, **params))
            self._runs[key] = found
        return self._runs[key]

    def opened(self, llm: LLM, draft: str, verify: str = "coupled", rows: int = 16) -> LLM:
        return llm.sibling(draft=draft, verify=verify, draft_rows=rows, draft_total=max(rows, 32))

    def text(self, llm: LLM, ids: list[int], number: int, tokens: int, **params: Any) -> Text:
        """One text. SystemExit if its drafter failed."""
        fields = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, "seed": sample_seed(self.seed, number), **params}
        request = Request(f"text {number}", list(ids), llm.params(SamplingParams(**fields)))
        llm.engine.add(request)
        written: list[int] = []
        stats, began = None, 0.0
        while llm.engine.has_work:
            for event in checked(llm.engine.step()):
                began = began or time.process_time()
                written += event.tokens
                stats = event.stats
        assert stats is not None
        if stats.fault:
            raise SystemExit(stats.fault)
        return Text(written, list(ids), stats.steps, stats.drafted, stats.accepted, time.process_time() - began)

    def rates(self, llm: LLM, draft: str, given: Seq[list[int]], **options: Any) -> F64:
        """Tokens a step of each text."""
        return np.array([one.rate for one in self.texts(llm, draft, given, **options)])

    def speedup(self, llm: LLM, draft: str, given: Seq[list[int]], *, base: str = "none", tokens: int = 40, **params: Any) -> F64:
        """For each prompt the processor time of the text with `base` over that with `draft`. The two take turns."""
        both = [self.opened(llm, one) for one in (base, draft)]
        for one in both:
            self.text(one, given[0], 0, 8)
        states = [one.engine.drafter.snapshot() for one in both]
        found = []
        for i, ids in enumerate(given):
            pair = []
            for one, state in zip(both, states, strict=True):
                forget(one, state)
                pair.append(self.text(one, ids, i, tokens, **params).seconds)
            found.append(pair[0] / pair[1])
        return np.array(found)

    # ---- texts that are scored

    @functools.cache  # noqa: B019
    def tasks(self, length: int = 512, usual: int = 8) -> dict[str, Task]:
        """Running text of the standard library, a needle, key-value pairs, by name."""
        wanted = Wanted(length=length, count=self.count(usual), given=64, seed=self.seed)
        return {task.name: task for task in build(self.llm.tokenizer, sources([]), wanted, length)}

    def scores(self, task: Task, **policy: str) -> cache.Scores:
        """Log-probabilities of the right tokens, f64[items, places]."""
        key = ("scores", task.name, task.longest, task.items, str(policy))
        if key not in self._runs:
            chosen = cache.PolicyAtBudget(str(policy), None, None, policy)
            self._runs[key] = cache.score(self.llm, task, task.probes, chosen, 4, lambda what: None)  # type: ignore[assignment]
        return self._runs[key]  # type: ignore[return-value]

    def nats(self, task: Task, **policy: str) -> F64:
        """Mean log-probability of the right tokens of each item, minus that with the full cache."""
        full = self.scores(task).logprobs
        return np.asarray((self.scores(task, **policy).logprobs - full).mean(1))


def forget(llm: LLM, state: Any) -> None:
    """Takes the drafter back to a snapshot, if it learns at all."""
    if state is not None:
        llm.engine.drafter.restore(state)
