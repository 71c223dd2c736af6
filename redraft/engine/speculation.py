"""The drafter and the verifier as the engine calls them: dispatchers over what its requests chose, its own where they chose nothing.

Nothing here knows a method's name. A drafter is opened once for each text that requests choose it by and each noise that it must draw
with, and shared by them all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.law import Law
from redraft.core.noise import Stream
from redraft.core.plan import Accepted, Budget, StepResult, Work
from redraft.core.sequence import Sequence
from redraft.core.taps import NOTHING, Taps
from redraft.core.tree import EMPTY, Kind, TokenTree
from redraft.draft.drafter import OpenDrafter
from redraft.engine.guard import Guard
from redraft.errors import Unsupported
from redraft.models.runner import Runner
from redraft.sample.sampler import Sampler
from redraft.verify.verifier import Verifier

MOST = 16  # opened drafters that are kept for requests; the one unused longest goes, with what it learned


class Choice(NamedTuple):
    """What a request chose; None: the engine's own."""

    drafter: Guard | None
    verifier: Verifier | None


class Verifiers:
    """own: the engine's."""

    def __init__(self, own: Verifier) -> None:
        self.own = own

    def accept(self, work: Seq[Work], trees: Seq[TokenTree], law: Law) -> list[Accepted]:
        groups = _groups(work, lambda seq: seq.speculation.verifier if seq.speculation else None)
        if len(groups) == 1:
            (verifier,) = groups
            return (verifier or self.own).accept(trees, law)
        found = [Accepted()] * len(work)
        for verifier, members in groups.items():
            some = (verifier or self.own).accept([trees[i] for i in members], law.only(members))
            for i, accepted in zip(members, some, strict=True):
                found[i] = accepted
        return found


class Drafters:
    """own: the engine's, which was opened for `verifier`; `text`: by what it was chosen, None where it was made by hand."""

    def __init__(self, own: OpenDrafter, runner: Runner, sampler: Sampler, verifier: Verifier, text: str | None = None) -> None:
        if unfit := own.kinds - verifier.undoes:
            raise _unfit(unfit, text or type(own).__name__, verifier)
        self.own, self.text = Guard(own, runner.spec.vocab, text), text
        self.runner, self.sampler, self.verifier = runner, sampler, verifier
        self._opened: OrderedDict[tuple[str, Stream], Guard] = OrderedDict()

    # ---- a request

    def check(self, params: SamplingParams) -> Choice | None:
        """What these parameters choose, None for nothing. UnknownMethod, InvalidInput or Unsupported, one line each."""
        if params.draft is None and params.verify is None:
            return None
        verifier: Verifier = self.verifier if params.verify is None else registry.create("verify", params.verify)
        text = self.text if params.draft is None else params.draft
        if text is None and verifier.drafts is not self.verifier.drafts and self.own.drafter.kinds - {Kind.FIXED}:
            raise Unsupported(f"verifier {registry.name_of(type(verifier))} wants other noise than {self.own.name} draws with")
        if text is None or (text == self.text and verifier.drafts is self.verifier.drafts):
            drafter = self.own
        else:
            drafter = self._open(text, verifier.drafts)
        if unfit := drafter.drafter.kinds - verifier.undoes:
            raise _unfit(unfit, text or drafter.name, verifier)
        return Choice(None if drafter is self.own else drafter, None if verifier == self.verifier else verifier)

    def _open(self, text: str, drafts: Stream) -> Guard:
        if (text, drafts) not in self._opened:
            drafter = registry.create("draft", text).open(self.runner, self.sampler.drawing(drafts))
            self._opened[text, drafts] = Guard(drafter, self.runner.spec.vocab, text)
            if len(self._opened) > MOST:
                self._opened.popitem(last=False)
        self._opened.move_to_end((text, drafts))
        return self._opened[text, drafts]

    def fit(self, seq: Sequence) -> None:
        """Gives a new sequence what its request chose."""
        seq.speculation = self.check(seq.params)
        if seq.params.draft_rows is not None:
            seq.drafts = seq.params.draft_rows
        if self.of(seq).quiet:
            seq.drafts = 0

    def of(self, seq: Sequence) -> Guard:
        chosen: Choice | None = seq.speculation
        return self.own if chosen is None or chosen.drafter is None else chosen.drafter

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
        """Each drafter whose texts ran hears of the whole step."""
        for drafter in _groups(result.work, self.of):
            drafter.observe(result)

    def snapshot(self) -> Any:
        return self.own.snapshot()

    def restore(self, snapshot: Any) -> None:
        self.own.restore(snapshot)


def _groups(work: Seq[Work], of: Callable[[Sequence], Any]) -> dict[Any, list[int]]:
    """The places in `work` of those who chose alike."""
    found: dict[Any, list[int]] = {}
    for i, one in enumerate(work):
        found.setdefault(of(one.seq), []).append(i)
    return found


def _unfit(kinds: Iterable[Any], draft: str, verifier: Verifier) -> Unsupported:
    fit = [name for name in registry.METHODS["verify"] if set(kinds) <= registry.method("verify", name).undoes]  # type: ignore[attr-defined]
    made, own = ", ".join(sorted(kind.name for kind in kinds)), registry.name_of(type(verifier))
    return Unsupported(f"verifier {own} cannot undo children made {made}, as {draft} makes them; these can: {', '.join(fit)}")
