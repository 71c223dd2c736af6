"""Dispatchers that call each request's drafter and verifier; the engine's own are the default.

This file names no method. A drafter is opened once for each choice of options and each kind of noise, and requests share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.distribution import Distribution
from redraft.core.plan import Accepted, Budget, StepResult, Work
from redraft.core.sequence import Sequence
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import EMPTY, Kind, TokenTree
from redraft.draft.drafter import OpenDrafter, max_bytes
from redraft.engine.guard import Guard
from redraft.engine.opened import Opened
from redraft.errors import Unsupported
from redraft.models.runner import Runner
from redraft.sample.sampler import Sampler
from redraft.verify.verifier import Verifier, opened

NOTHING = Budget(0, 0)


class Speculation(NamedTuple):
    """The drafter and verifier that a request chose. None: the engine's own."""

    drafter: Guard | None
    verifier: Verifier | None


class Verifiers:
    """own: the engine's verifier."""

    def __init__(self, own: Verifier) -> None:
        self.own = own

    def taps(self, seqs: Iterable[Sequence]) -> Taps:
        found = NO_TAPS
        for verifier in {seq.speculation.verifier if seq.speculation else None for seq in seqs}:
            found |= getattr(verifier or self.own, "taps", NO_TAPS)
        return found

    def accept(self, work: Seq[Work], trees: Seq[TokenTree], distribution: Distribution) -> list[Accepted]:
        groups = _groups(work, lambda seq: seq.speculation.verifier if seq.speculation else None)
        if len(groups) == 1:
            (verifier,) = groups
            return (verifier or self.own).accept(trees, distribution)
        found = [Accepted()] * len(work)
        for verifier, members in groups.items():
            some = (verifier or self.own).accept([trees[i] for i in members], distribution.only(members))
            for i, accepted in zip(members, some, strict=True):
                found[i] = accepted
        return found


class Drafters:
    """own: the engine's drafter, opened for `verifier`; `text`: "name:option=value,...", None if it was not made from a text."""

    def __init__(
        self, own: OpenDrafter, runner: Runner, sampler: Sampler, verifier: Verifier, methods: Opened, text: str | None = None
    ) -> None:
        if unfit := own.kinds - verifier.supports:
            raise _unfit(unfit, text or type(own).__name__, verifier)
        self.own, self.method = (
            Guard(own, runner.spec.vocab, text, runner.spec.hidden),
            None if text is None else registry.create("draft", text),
        )
        self.runner, self.sampler, self.verifier, self.opened = runner, sampler, verifier, methods
        self.awake = True  # whether a text of this step is looked at
        self._proposed: list[TokenTree] | None = None  # before constraints changed some

    # ---- a request

    def check(self, params: SamplingParams) -> Speculation | None:
        """What these parameters choose; None if they choose neither. Raises UnknownMethod, InvalidInput or Unsupported, one line each."""
        if params.draft is None and params.verify is None:
            return None
        verifier = self.verifier if params.verify is None else self._opened_verifier(params.verify)
        method = self.method if params.draft is None else registry.create("draft", params.draft)
        same_noise = (verifier.drafts, verifier.exact) == (self.verifier.drafts, self.verifier.exact)
        if method is None and not same_noise and self.own.drafter.kinds - {Kind.FIXED}:
            raise Unsupported(
                f"verifier {registry.name_of(type(verifier))} needs another kind of noise than drafter {self.own.name} draws with"
            )
        name = self.own.name if params.draft is None else params.draft.strip()
        drafter = self.own if method is None or (method == self.method and same_noise) else self._open(name, method, verifier)
        if unfit := drafter.drafter.kinds - verifier.supports:
            raise _unfit(unfit, name, verifier)
        return Speculation(None if drafter is self.own else drafter, None if verifier == self.verifier else verifier)

    def _open(self, name: str, method: Any, verifier: Verifier) -> Guard:
        def make() -> Guard:
            spec, made = self.runner.spec, method.open(self.runner, self.sampler.for_drafts(verifier.drafts, verifier.exact))
            return Guard(made, spec.vocab, name, spec.hidden)

        return self.opened.get(f"draft = {name}", ("draft", method, verifier.drafts, verifier.exact), make, max_bytes(method, self.runner))

    def _opened_verifier(self, name: str) -> Verifier:
        method: Verifier = registry.create("verify", name)
        if not hasattr(method, "open"):
            return method
        return self.opened.get(f"verify = {name}", ("verify", method), lambda: opened(method, self.runner))

    def fit(self, seq: Sequence) -> None:
        """Gives a new sequence the drafter and verifier that its request chose."""
        seq.speculation = self.check(seq.params)
        if seq.params.draft_rows is not None:
            seq.drafts = seq.params.draft_rows
        if self.of(seq).never_drafts:
            seq.drafts = 0

    def release(self, seq: Sequence) -> None:
        """After the last use of a sequence. A caller may keep the sequence, but must not keep its drafter alive."""
        seq.speculation = None

    def parts(self, seq: Sequence) -> tuple[Any, ...]:
        return () if seq.speculation is None else seq.speculation

    def of(self, seq: Sequence) -> Guard:
        chosen: Speculation | None = seq.speculation
        return self.own if chosen is None or chosen.drafter is None else chosen.drafter

    def names(self, seq: Sequence) -> Seq[str]:
        """Names of the drafters that TokenTree.origins indexes; the last one is the request's constraint, if it has one."""
        own, constraint = self.of(seq).names, self.sampler.constraint(seq)
        return own if constraint is None else (*own, constraint.name)

    def stopped(self, seq: Sequence) -> Seq[str]:
        """Names of the drafters that do not draft for this text at the moment, because they did not pay."""
        return self.of(seq).stopped(seq)

    # ---- what the engine calls

    def taps(self, seqs: Iterable[Sequence]) -> Taps:
        found = NO_TAPS
        if self.awake:
            for drafter in {self.of(seq) for seq in seqs}:
                found |= drafter.taps
        return found

    def begin(self, seq: Sequence) -> None:
        self.of(seq).begin(seq)

    def fork(self, seq: Sequence, child: Sequence) -> None:
        self.of(seq).fork(seq, child)

    def end(self, seq: Sequence) -> None:
        self.of(seq).end(seq)

    def propose(self, work: Seq[Work], budgets: Seq[Budget]) -> list[TokenTree]:
        """While all texts rest, drafters are not asked and see nothing of the step. Those that read states see the last step of a rest,
        because they draft from these in the next one."""
        trees, own = [EMPTY] * len(work), list(budgets)
        self.awake = False
        for i, one in enumerate(work):
            if one.seq.rest:
                one.seq.rest -= 1
                own[i] = NOTHING
                self.awake = self.awake or (not one.seq.rest and bool(self.of(one.seq).taps.hidden))
            else:
                self.awake = True
        if self.awake:
            for drafter, members in _groups(work, self.of).items():
                some = drafter.propose([work[i].seq for i in members], [own[i] for i in members])
                for i, tree in zip(members, some, strict=True):
                    trees[i] = tree
        return self._fitted(work, budgets, trees)

    def _fitted(self, work: Seq[Work], budgets: Seq[Budget], trees: list[TokenTree]) -> list[TokenTree]:
        """The trees as the constraints of their requests change them."""
        fitted = list(trees)
        for i, (one, budget) in enumerate(zip(work, budgets, strict=True)):
            if one.done and (constraint := self.sampler.constraint(one.seq)) is not None:
                if budget.rows > 0 and budget.depth > 0:
                    fitted[i] = constraint.fit(one.seq, trees[i], budget, len(self.of(one.seq).names))
                constraint.prepare(one.seq)
        self._proposed = trees if any(old is not new for old, new in zip(trees, fitted, strict=True)) else None
        return fitted

    def observe(self, result: StepResult) -> None:
        """Passes the whole step to each drafter of its sequences."""
        if self._proposed is not None:
            result = result._replace(proposed=self._proposed)
        if self.awake:
            for drafter in _groups(result.work, self.of):
                drafter.observe(result)

    def snapshot(self) -> Any:
        return self.own.snapshot()

    def restore(self, snapshot: Any) -> None:
        self.own.restore(snapshot)


def _groups(work: Seq[Work], of: Callable[[Sequence], Any]) -> dict[Any, list[int]]:
    """Indices in `work`, grouped by what `of` returns."""
    found: dict[Any, list[int]] = {}
    for i, one in enumerate(work):
        found.setdefault(of(one.seq), []).append(i)
    return found


def _unfit(kinds: Iterable[Any], draft: str, verifier: Verifier) -> Unsupported:
    fit = [name for name in registry.METHODS["verify"] if set(kinds) <= registry.method("verify", name).supports]  # type: ignore[attr-defined]
    made, own = ", ".join(sorted(kind.name for kind in kinds)), registry.name_of(type(verifier))
    return Unsupported(f"verifier {own} does not support children made {made}, which {draft} makes; these do: {', '.join(fit)}")
