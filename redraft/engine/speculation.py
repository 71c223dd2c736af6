"""The drafter and the verifier as the engine calls them: dispatchers over what its requests chose, its own where they chose nothing.

Nothing here knows a method's name. A drafter is opened once for each choice and each noise that it must draw with, and shared by all
requests that choose it.
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
from redraft.core.taps import NOTHING, Taps
from redraft.core.tree import EMPTY, Kind, TokenTree
from redraft.draft.drafter import OpenDrafter, max_bytes
from redraft.engine.guard import Guard
from redraft.engine.opened import Opened
from redraft.errors import Unsupported
from redraft.models.runner import Runner
from redraft.sample.sampler import Sampler
from redraft.verify.verifier import Verifier


class Choice(NamedTuple):
    """What a request chose; None: the engine's own."""

    drafter: Guard | None
    verifier: Verifier | None


class Verifiers:
    """own: the engine's."""

    def __init__(self, own: Verifier) -> None:
        self.own = own

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
    """own: the engine's, which was opened for `verifier`; `text`: by what it was chosen, None where it was made by hand."""

    def __init__(
        self, own: OpenDrafter, runner: Runner, sampler: Sampler, verifier: Verifier, opened: Opened, text: str | None = None
    ) -> None:
        if unfit := own.kinds - verifier.supports:
            raise _unfit(unfit, text or type(own).__name__, verifier)
        self.own, self.method = Guard(own, runner.spec.vocab, text), None if text is None else registry.create("draft", text)
        self.runner, self.sampler, self.verifier, self.opened = runner, sampler, verifier, opened

    # ---- a request

    def check(self, params: SamplingParams) -> Choice | None:
        """What these parameters choose, None for nothing. UnknownMethod, InvalidInput or Unsupported, one line each."""
        if params.draft is None and params.verify is None:
            return None
        verifier: Verifier = self.verifier if params.verify is None else registry.create("verify", params.verify)
        method = self.method if params.draft is None else registry.create("draft", params.draft)
        same_noise = verifier.drafts is self.verifier.drafts
        if method is None and not same_noise and self.own.drafter.kinds - {Kind.FIXED}:
            raise Unsupported(f"verifier {registry.name_of(type(verifier))} wants other noise than {self.own.name} draws with")
        name = self.own.name if params.draft is None else params.draft.strip()
        drafter = self.own if method is None or (method == self.method and same_noise) else self._open(name, method, verifier)
        if unfit := drafter.drafter.kinds - verifier.supports:
            raise _unfit(unfit, name, verifier)
        return Choice(None if drafter is self.own else drafter, None if verifier == self.verifier else verifier)

    def _open(self, name: str, method: Any, verifier: Verifier) -> Guard:
        def make() -> Guard:
            return Guard(method.open(self.runner, self.sampler.for_drafts(verifier.drafts)), self.runner.spec.vocab, name)

        return self.opened.get(f"draft = {name}", ("draft", method, verifier.drafts), make, max_bytes(method, self.runner))

    def fit(self, seq: Sequence) -> None:
        """Gives a new sequence what its request chose."""
        seq.speculation = self.check(seq.params)
        if seq.params.draft_rows is not None:
            seq.drafts = seq.params.draft_rows
        if self.of(seq).never_drafts:
            seq.drafts = 0

    def release(self, seq: Sequence) -> None:
        """After the last use of a sequence: whoever still holds it does not hold its drafter."""
        seq.speculation = None

    def parts(self, seq: Sequence) -> tuple[Any, ...]:
        return () if seq.speculation is None else (seq.speculation.drafter,)

    def of(self, seq: Sequence) -> Guard:
        chosen: Choice | None = seq.speculation
        return self.own if chosen is None or chosen.drafter is None else chosen.drafter

    def names(self, seq: Sequence) -> Seq[str]:
        """What TokenTree.origins of its trees count."""
        return self.of(seq).names

    # ---- what the engine calls

    def taps(self, seqs: Iterable[Sequence]) -> Taps:
        found = NOTHING
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
        trees = [EMPTY] * len(work)
        for drafter, members in _groups(work, self.of).items():
            some = drafter.propose([work[i].seq for i in members], [budgets[i] for i in members])
            for i, tree in zip(members, some, strict=True):
                trees[i] = tree
        return trees

    def observe(self, result: StepResult) -> None:
        """Each drafter that drafts for a sequence of the step is given the whole step."""
        for drafter in _groups(result.work, self.of):
            drafter.observe(result)

    def snapshot(self) -> Any:
        return self.own.snapshot()

    def restore(self, snapshot: Any) -> None:
        self.own.restore(snapshot)


def _groups(work: Seq[Work], of: Callable[[Sequence], Any]) -> dict[Any, list[int]]:
    """The places in `work` of equal choices."""
    found: dict[Any, list[int]] = {}
    for i, one in enumerate(work):
        found.setdefault(of(one.seq), []).append(i)
    return found


def _unfit(kinds: Iterable[Any], draft: str, verifier: Verifier) -> Unsupported:
    fit = [name for name in registry.METHODS["verify"] if set(kinds) <= registry.method("verify", name).supports]  # type: ignore[attr-defined]
    made, own = ", ".join(sorted(kind.name for kind in kinds)), registry.name_of(type(verifier))
    return Unsupported(f"verifier {own} cannot undo children made {made}, as {draft} makes them; these can: {', '.join(fit)}")
