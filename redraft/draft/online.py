"""Learns from the places where the target corrected the draft: another process trains the draft model, which changes while requests run.

Xiaoxuan Liu, Lanxiang Hu, Peter Bailis, Alvin Cheung, Zhijie Deng, Ion Stoica, Hao Zhang: Online Speculative Decoding, 2023,
arXiv 2310.07177.

1. Where the target draws a token that was not drafted, its most likely tokens with their probabilities are noted.
2. When a text ends, its tokens and notes are written to the folder `path`, where `python -m redraft_train.online` finds them.
3. When better weights appear there, they replace those of the draft model between two steps. Keys that older weights made stay.
4. If drafts are then accepted less often than before, by more than chance explains, the older weights return.

Differs: weights are trained in another process and checked on held-out texts first, a distribution is its most likely tokens and the
rest, and step 4 is added. Texts of requests with a cache salt, as that of an API key, are never written: they have tenants of their own.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import numpy as np

from redraft import registry
from redraft.card import Card, Guarantee
from redraft.core.plan import Budget, StepResult
from redraft.core.sequence import Sequence
from redraft.core.taps import Taps
from redraft.core.tree import F32, I64, TokenTree
from redraft.draft.drafter import Drafter, OpenDrafter, Wrapper, max_bytes
from redraft.errors import CheckpointError, InvalidInput, Unsupported
from redraft.ops.arrays import array, log_sum_exp
from redraft.options import Options, number

TEXTS, DRAFT = "texts", "draft"  # folders in `path`: what was noted, and the trained model
WAITING = 512  # texts that wait for training; more are not written
DOUBT = 2.0  # standard errors


class WithWeights(OpenDrafter, Protocol):
    """An opened drafter whose model can change."""

    @property
    def runner(self) -> Any: ...
    def swap(self, weights: Any) -> None: ...


@dataclass(frozen=True)
class Online(Options):
    """draft: the drafter with a draft model, options in parentheses; path: the folder that it shares with the process that trains; top:
    tokens of a distribution; trial: steps with drafts after which new weights are judged."""

    draft: str = "draft-model"
    path: Path | None = None
    top: int = number(64, ge=1)
    trial: int = number(200, ge=1)

    card: ClassVar[Card] = Card(
        "Online speculative decoding",
        "Liu, Hu, Bailis, Cheung, Deng, Stoica, Zhang, Online Speculative Decoding, 2023, arXiv 2310.07177",
        Guarantee.SAME_TEXT,
        needs="a draft model, and python -m redraft_train.online beside the engine",
        deviates="trains in another process; only the likeliest tokens; worse weights are taken back",
        summary="Trains the draft model on its errors; steady traffic",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None:
            raise InvalidInput("online:path=none: must be a folder for texts, which are written there, and for trained weights")
        self.made()

    def made(self) -> Drafter:
        (inner,) = registry.split(self.draft, "\n")  # without its parentheses
        return cast(Drafter, registry.create("draft", inner))

    def max_bytes(self, runner: Any) -> int:
        return max_bytes(self.made(), runner)

    def open(self, runner: Any, sampler: Any) -> Learner:
        opened = self.made().open(runner, sampler)
        if not hasattr(opened, "swap"):
            raise Unsupported(f"online:draft={self.draft}: this drafter has no draft model that can change")
        return Learner(cast(WithWeights, opened), self)


class Note(NamedTuple):
    """place: of the corrected token in its text; ids i64[top] and logs f32[top]: the likeliest tokens there."""

    place: int
    ids: I64
    logs: F32


@dataclass(eq=False, slots=True)
class Noted:
    """Of one text."""

    seq: Sequence
    notes: list[Note] = field(default_factory=list)


class Rate:
    """How often drafted tokens were accepted in the last `most` steps with drafts."""

    def __init__(self, most: int) -> None:
        self.steps: deque[float] = deque(maxlen=most)

    def add(self, accepted: int, drafted: int) -> None:
        self.steps.append(accepted / drafted)

    @property
    def full(self) -> bool:
        return len(self.steps) == self.steps.maxlen

    def below(self, other: Rate) -> bool:
        """Whether this rate is smaller, by more than chance explains."""
        mine, theirs = np.array(self.steps), np.array(other.steps)
        return bool(mine.mean() + DOUBT * sqrt(mine.var() / len(mine) + theirs.var() / len(theirs)) < theirs.mean())


class Learner(Wrapper):
    """The opened form. rate: of the weights in use; older: weights and rate before, while new ones are judged; reverted: how often weights
    were taken back."""

    def __init__(self, drafter: WithWeights, method: Online) -> None:
        assert method.path is not None
        super().__init__([drafter])
        self.drafter, self.method = drafter, method
        self.taps |= Taps(logits=True)
        self.texts, self.file = method.path / TEXTS, method.path / DRAFT / "model.safetensors"
        self.rate = Rate(method.trial)
        self.older: tuple[Any, Rate] | None = None
        self.reverted, self._version, self._numbers = 0, 0, itertools.count()
        try:
            self.texts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"online:path={method.path}: {error.strerror}") from None

    # ---- one request

    def begin(self, seq: Sequence) -> list[Any]:
        return [*super().begin(seq), Noted(seq)]

    def fork(self, state: list[Any], seq: Sequence) -> list[Any]:
        return [*super().fork(state[:-1], seq), Noted(seq)]

    def end(self, state: list[Any]) -> None:
        super().end(state[: len(self.parts)])
        for noted in state[len(self.parts) :]:
            if noted.notes and not noted.seq.request.salt and noted.seq.request.vectors is None:
                self._write(noted)

    def _write(self, noted: Noted) -> None:
        """2. A disk that is full costs the notes, not the text."""
        from safetensors.numpy import save_file

        try:
            if len(os.listdir(self.texts)) >= WAITING:
                return
            path = self.texts / f"{os.getpid()}-{next(self._numbers)}.safetensors"
            notes = noted.notes
            arrays = {
                "tokens": np.array(noted.seq.tokens, np.int32),
                "index": np.array([note.place for note in notes], np.int32),
                "ids": np.stack([note.ids for note in notes]).astype(np.int32),
                "logs": np.stack([note.logs for note in notes]),
            }
            save_file(arrays, partial := path.with_suffix(".part"))
            partial.replace(path)
        except OSError:
            return

    # ---- one step

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        self._refresh()
        return self.drafter.propose(seqs, budgets)

    def observe(self, result: StepResult) -> None:
        super().observe(result)
        for s, (work, accepted) in enumerate(zip(result.work, result.accepted, strict=True)):
            tree, path = result.own(s)
            state = work.seq.state.get(self)
            if state is None or not accepted.tokens or not len(tree):
                continue
            self.rate.add(len(path), len(tree))
            last = path[-1] if path else -1
            if result.trees[s] is tree and (tree.parents == last).any() and len(accepted.tokens) == len(path) + 1:  # 1.
                logits = array(result.out.logits[int(result.distribution.roots[s]) + 1 + last]).astype(np.float64)
                ids = np.argpartition(-logits, min(self.method.top, len(logits)) - 1)[: self.method.top]
                logs = (logits[ids] - log_sum_exp(logits[None])[0]).astype(np.float32)
                state[-1].notes.append(Note(len(work.seq.tokens) - 1, ids, logs))
        if self.older is not None and self.rate.full:
            weights, rate = self.older
            self.older = None
            if rate.steps and self.rate.below(rate):  # 4.
                self.drafter.swap(weights)
                self.rate, self.reverted = rate, self.reverted + 1

    def _refresh(self) -> None:
        """3."""
        try:
            version = self.file.stat().st_mtime_ns
        except OSError:
            return
        if version == self._version:
            return
        self._version = version
        from redraft.models.draft_model import weights_like

        try:
            weights = weights_like(self.drafter.runner, self.file.parent)
        except CheckpointError:  # it is being replaced, or of another model
            return
        if self.older is None:
            self.older = self.drafter.runner.weights, self.rate
        self.drafter.swap(weights)
        self.rate = Rate(self.method.trial)
