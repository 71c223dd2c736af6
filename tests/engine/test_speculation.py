"""Requests of one engine choose their own drafter, verifier and budget. Each text is the same as without the others."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.card import Card, Guarantee
from redraft.config import SamplingParams
from redraft.core.noise import Stream, mix
from redraft.core.plan import Budget, StepPlan
from redraft.core.sequence import Request, Sequence
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import EMPTY, Kind, TokenTree
from redraft.draft.drafter import Stateless
from redraft.draft.none import NoDraft
from redraft.engine import speculation
from redraft.engine.engine import Engine
from redraft.errors import InvalidInput, UnknownMethod, Unsupported
from tests.contracts import identity, plain
from tests.contracts.drafters import RandomTrees
from tests.contracts.identity import drive, engine, prompts
from tests.engine.spelling import truth
from tests.engine.test_guard import Distributions

NEW = 24
SAMPLED = SamplingParams(temperature=0.9, max_tokens=NEW)
TEXTS = {(str(i), 0): truth(SAMPLED.but(seed=50 + i), prompts()[i % 6], new=NEW) for i in range(12)}


class Tossed(Stateless):
    """Draws one or several children from a distribution that depends on the last tokens: for verifiers that draw at random."""

    def __init__(self, sampler: Any, kind: Kind) -> None:
        self.sampler, self.kinds, self.kind = sampler, frozenset({kind}), kind

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        return [self._tree(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]

    def _tree(self, seq: Sequence, budget: Budget) -> TokenTree:
        if min(budget) < 2:
            return EMPTY
        dice = Random(mix(seq.seed, len(seq.tokens), int(self.sampler.drafts is Stream.DRAFT)))
        weights = np.array([dice.random() ** 3 for _ in range(plain.VOCAB)])
        distribution = weights / weights.sum()
        count = 1 if self.kind is Kind.SINGLE else 2
        drawn: list[int] = []
        while len(drawn) < count:
            (token,) = dice.choices(range(plain.VOCAB), distribution.tolist())
            drawn += [token] * (token not in drawn)
        kinds = np.array([self.kind, *[Kind.FIXED] * count], np.uint8)
        return TokenTree(
            np.array(drawn, np.int32),
            np.full(count, -1, np.int32),
            kinds,
            Distributions(lambda rows: np.tile(distribution, (len(rows), 1))),
        )


class Registered:
    """Hyper-parameters of a drafter that only tests have."""

    card = Card("", "", Guarantee.SAME_TEXT)

    def __init__(self, opens: Any) -> None:
        self.opens, self.opened = opens, 0

    def open(self, runner: Any, sampler: Any) -> Any:
        self.opened += 1
        return self.opens(sampler)


class Tapping(RandomTrees):
    taps = Taps(top_k=3)


class Broken(Stateless):
    """Raises in `where`."""

    def __init__(self, where: str) -> None:
        self.where = where

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        if self.where == "propose":
            raise ValueError("cannot propose")
        return [EMPTY] * len(seqs)

    def observe(self, result: Any) -> None:
        if self.where == "observe":
            raise ValueError("cannot hear")


def own() -> dict[str, Registered]:
    return {
        "oracle": Registered(lambda sampler: RandomTrees(plain.VOCAB, seed=4, right=0.8, known=TEXTS)),
        "wrong": Registered(lambda sampler: RandomTrees(plain.VOCAB, seed=9)),
        "single": Registered(lambda sampler: Tossed(sampler, Kind.SINGLE)),
        "iid": Registered(lambda sampler: Tossed(sampler, Kind.WITHOUT_REPLACEMENT)),
        "tapping": Registered(lambda sampler: Tapping(plain.VOCAB, seed=3)),
        "deaf": Registered(lambda sampler: Broken("observe")),
        "mute": Registered(lambda sampler: Broken("propose")),
    }


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[str, Registered]:
    """Registers the drafters of this file, too."""
    drafters, right = own(), registry.create

    def create(seam: str, text: str, **options: Any) -> Any:
        return drafters[text] if seam == "draft" and text in drafters else right(seam, text, **options)

    monkeypatch.setattr(registry, "create", create)
    return drafters


def request(i: int, **changes: Any) -> Request:
    return Request(str(i), list(prompts()[i % 6]), SAMPLED.but(**{"seed": 50 + i, **changes}))


def alone(i: int, drafter: str = "none", **changes: Any) -> list[int]:
    name = str(i) if changes.get("n", 1) == 1 else f"{i}/0"
    return drive(engine(partial(identity.opened_by_name, drafter)), [request(i, **changes)], [0]).texts[name]


MIXED: list[dict[str, Any]] = [
    {},
    {"draft": "none"},
    {"draft": "oracle"},
    {"draft": "oracle", "draft_rows": 1},
    {"draft": "token-recycling"},
    {"draft": "copyspec", "prediction": tuple(TEXTS["5", 0])},
    {"draft": "union"},
    {"draft": "oracle", "draft_rows": 0},
    {"draft": "wrong", "verify": "coupled"},
    {"draft": "tapping"},
    {"draft": "self-skip"},
    {"verify": "greedy-multi-draft", "draft": "oracle"},
]


@pytest.mark.parametrize("drafter", ["none", "token-recycling"])
@pytest.mark.parametrize(("pool", "chunk"), [(40, 512), (40, 9), (8, 512), (6, 20)])
def test_every_text_of_a_mixture_is_the_plain_loops(drafter: str, pool: int, chunk: int) -> None:
    mixed = [one for one in MIXED if one.get("draft") != "self-skip"]  # the tiny model has two layers
    made = engine(drafter, pool=pool, chunk=chunk)
    seen = drive(made, [request(i, **one) for i, one in enumerate(mixed)], [0, 0, 1, 1, 1, 2, 3, 5, 8, 8, 9])
    assert seen.texts == {str(i): TEXTS[str(i), 0] for i in range(len(mixed))}
    assert seen.accepted and seen.rejected and (seen.preempted or pool > 6)


def test_self_skip_beside_others() -> None:
    texts = [list(identity.expected(None, prompts()[i], "sampled", 100 + i, 4)) for i in range(4)]
    requests = [
        Request(str(i), list(prompts()[i]), identity.SAMPLING["sampled"].but(seed=100 + i, draft=draft))
        for i, draft in enumerate(("self-skip", "none", "self-skip", "token-recycling"))
    ]
    made = engine(layers=4, pool=12)
    assert [drive(made, requests, [0, 0, 1, 4]).texts[str(i)] for i in range(4)] == texts


@pytest.mark.parametrize("pool", [40, 7])
def test_siblings_draft_as_their_request_chose(pool: int) -> None:
    made = engine(RandomTrees(plain.VOCAB, seed=1), pool=pool)
    mixed: list[dict[str, Any]] = [{"n": 3}, {"n": 2, "draft": "token-recycling"}, {"n": 3, "draft": "none"}, {"draft": "oracle"}]
    seen = drive(made, [request(i, **one) for i, one in enumerate(mixed)], [0, 0, 1, 2])
    for i, one in enumerate(mixed):
        expected = drive(engine(), [request(i, n=one.get("n", 1))], [0]).texts
        assert {name: text for name, text in seen.texts.items() if name.split("/")[0] == str(i)} == expected


TOSSING: list[dict[str, Any]] = [
    {"draft": "single", "verify": "rejection"},
    {"draft": "single", "verify": "rejection"},
    {"draft": "iid", "verify": "recursive"},
    {"draft": "single", "verify": "rejection", "temperature": 0.0},
    {"draft": "oracle", "verify": "rejection"},
]


@pytest.mark.parametrize(("pool", "chunk"), [(40, 512), (40, 60), (6, 512)])
def test_coins_fall_as_they_do_alone(pool: int, chunk: int) -> None:
    """Draws and drafts depend on the position only, so the other requests of a batch change nothing. (Except for a prompt that is cut
    before its last token: then the first token has a draft.)"""
    mixed = [*TOSSING, {}, {"draft": "oracle"}]
    expected = [drive(engine(), [request(i, **one)], [0]).texts[str(i)] for i, one in enumerate(mixed)]
    made = engine(RandomTrees(plain.VOCAB, seed=4, right=0.8, known=TEXTS), pool=pool, chunk=chunk)
    seen = drive(made, [request(i, **one) for i, one in enumerate(mixed)], [0, 0, 0, 1, 1, 2, 3])
    assert bool(seen.preempted) == (pool == 6)
    found = [seen.texts[str(i)] for i in range(len(mixed))]
    if pool == 40:
        assert found == expected
    else:  # if pages are missing, budgets shrink; with fewer drafts other tokens are drawn from the same distribution
        assert found[4:] == expected[4:]
    assert found[5] == TEXTS["5", 0] and found[6] == TEXTS["6", 0]
    assert found[0] != TEXTS["0", 0] and found[1] != TEXTS["1", 0], "nothing was drawn"
    assert found[4] == TEXTS["4", 0], "fixed children need no draw"


# ---- which requests draft


class Watcher:
    """The budgets of each step, by request."""

    def __init__(self, made: Engine) -> None:
        self.plans: list[StepPlan] = []
        self.taps: list[Taps] = []
        right, taps = made.drafter.propose, made.drafter.taps

        def propose(work: Any, budgets: Any) -> Any:
            self.plans.append(StepPlan(list(work), list(budgets)))
            return right(work, budgets)

        def tapped(seqs: Any) -> Taps:
            self.taps.append(taps(seqs))
            return self.taps[-1]

        made.drafter.propose, made.drafter.taps = propose, tapped  # type: ignore[method-assign]


def test_the_budget_is_shared_among_those_that_draft() -> None:
    made = engine()
    made.scheduler = registry.create("sched", "sarathi", token_budget=512, max_seqs=8, draft_rows=8, draft_total=12)
    watcher = Watcher(made)
    chosen: list[dict[str, Any]] = [{}, {"draft": "none"}, {"draft": "wrong"}, {"draft": "wrong", "draft_rows": 0}, {"draft": "mute"}]
    chosen += [{"draft": "wrong", "draft_rows": 2}]
    for i, one in enumerate(chosen):
        made.add(request(i, **one))
    shares: dict[str, set[int]] = {str(i): set() for i in range(len(chosen))}
    for step in range(NEW - 6):
        made.step()
        for work, budget in zip(watcher.plans[-1].work, watcher.plans[-1].budgets, strict=True):
            if step > 3 and len(watcher.plans[-1].work) == len(chosen):
                shares[work.seq.request.id].add(budget.rows)
    assert shares["0"] == shares["1"] == shares["3"] == {0}, "requests that never draft take none"
    assert shares["4"] == {0}, "nor do requests that stopped drafting"
    assert shares["2"] == {6} and shares["5"] == {2}


def test_taps_are_those_of_the_texts_in_the_step() -> None:
    made = engine(RandomTrees(plain.VOCAB, seed=1))
    watcher = Watcher(made)
    made.add(request(0))
    made.add(request(1, draft="tapping", max_tokens=3))
    while made.has_work:
        made.step()
        names = {work.seq.request.id for work in watcher.plans[-1].work}
        assert (watcher.taps[-1].top_k == 3) == ("1" in names)
        assert "1" in names or watcher.taps[-1] == NO_TAPS
    assert any(taps == NO_TAPS for taps in watcher.taps) and any(taps.top_k for taps in watcher.taps)


@pytest.mark.parametrize("culprit", ["deaf", "mute"])
def test_the_fault_of_one_drafter_is_no_other_drafters(culprit: str) -> None:
    made = engine(RandomTrees(plain.VOCAB, seed=4, right=0.8, known=TEXTS))
    for i, one in enumerate([{}, {"draft": culprit}, {"draft": "token-recycling"}, {"draft": "none"}]):
        made.add(request(i, **one))
    reported: dict[str, list[int]] = {}
    faults: dict[str, str] = {}
    while made.has_work:
        for event in made.step():
            reported.setdefault(event.request.id, []).extend(event.tokens)
            faults[event.request.id] = event.stats.fault
    assert reported == {str(i): TEXTS[str(i), 0] for i in range(4)}
    assert faults.pop("1").startswith(f"{culprit}: ValueError: cannot") and not any(faults.values())


# ---- texts that rest


class Resting(RandomTrees):
    """Lets every text rest for `steps` steps after each that it drafted for, and writes down what it is asked and shown."""

    taps = Taps(top_k=3)

    def __init__(self, steps: int) -> None:
        super().__init__(plain.VOCAB, seed=5, right=0.8, known=TEXTS)
        self.steps, self.asked, self.seen = steps, [], []  # type: ignore[var-annotated]

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        drafting = [seq.id for seq, budget in zip(seqs, budgets, strict=True) if min(budget) > 0]
        for seq in seqs:
            seq.rest = self.steps if seq.id in drafting else seq.rest
        self.asked.append(drafting)
        return super().propose(seqs, budgets)

    def observe(self, result: Any) -> None:
        assert result.out.top_k is not None
        self.seen.append([work.seq.id for work in result.work])


def test_while_all_texts_rest_the_drafter_is_neither_asked_nor_shown_the_step(made_up: dict[str, Registered]) -> None:
    drafter = Resting(3)
    made_up["resting"] = Registered(lambda sampler: drafter)
    made, steps = engine(), []
    forward = made.runner.forward

    def counted(batch: Any, taps: Taps) -> Any:
        steps.append(taps.top_k)
        return forward(batch, taps)

    made.runner.forward = counted  # type: ignore[method-assign]
    found = drive(made, [request(0, draft="resting")], [0])
    assert found.texts == {"0": TEXTS["0", 0]} and found.accepted
    assert len(drafter.asked) == len(drafter.seen) == sum(top_k == 3 for top_k in steps) < len(steps)
    assert steps[-8:-4].count(3) == 1, "one in four"


def test_a_text_that_rests_has_no_budget_beside_one_that_does_not(made_up: dict[str, Registered]) -> None:
    drafter = Resting(2)
    made_up["resting"] = Registered(lambda sampler: drafter)
    found = drive(engine(), [request(i, draft="resting") for i in range(2)], [0, 3])
    assert found.texts == {str(i): TEXTS[str(i), 0] for i in range(2)}
    assert any(len(asked) == 1 for asked in drafter.asked) and any(len(seen) == 2 for seen in drafter.seen)


# ---- opened methods


def test_what_a_drafter_learned_stays(made_up: dict[str, Registered]) -> None:
    made = engine()
    drive(made, [request(0, draft="token-recycling")], [0])
    guard = made.drafter.check(SAMPLED.but(draft="token-recycling")).drafter  # type: ignore[union-attr]
    assert guard is not None
    learned = guard.drafter
    assert made.drafter.own.never_drafts and not guard.never_drafts
    again = drive(made, [request(0, draft="token-recycling")], [0])
    assert made.drafter.check(SAMPLED.but(draft="token-recycling")).drafter.drafter is learned  # type: ignore[union-attr]
    first = drive(engine(), [request(0, draft="token-recycling")], [0])
    assert again.texts == first.texts and again.accepted > first.accepted, "it learned the text the first time"


def test_the_one_unused_longest_goes_and_none_in_use() -> None:
    made = engine()
    made.opened.max_count = 4
    texts = [f"token-recycling:k={k}" for k in range(1, 7)]

    def opened(text: str) -> Any:
        return made.drafter.check(SAMPLED.but(draft=text)).drafter  # type: ignore[union-attr]

    first = {text: opened(text) for text in texts[:4]}
    made.add(request(1, draft=texts[0]))
    reported = [token for event in made.step() for token in event.tokens]
    assert opened(texts[1]) is first[texts[1]]
    for text in (*texts[2:4], *texts[1:2]):
        assert opened(text) is first[text]
    opened(texts[4])  # closes the third, because the first is in use
    assert made.opened.count == 4 and opened(texts[0]) is first[texts[0]] and opened(texts[1]) is first[texts[1]]
    assert opened(texts[2]) is not first[texts[2]]
    while made.has_work:
        reported += [token for event in made.step() for token in event.tokens]
    assert reported == TEXTS["1", 0]
    opened(texts[5])
    assert made.opened.count == 4
    for text in texts[1:5]:
        opened(text)
    assert opened(texts[0]) is not first[texts[0]], "it is unused"


def test_two_spellings_of_a_choice_are_one(made_up: dict[str, Registered]) -> None:
    made = engine("token-recycling", draft="token-recycling")
    spelled = ["token-recycling:k=4", " token-recycling : k = 4", "(token-recycling:k=04)"]
    guards = {made.drafter.check(SAMPLED.but(draft=text)).drafter for text in spelled}  # type: ignore[union-attr]
    assert len(guards) == made.opened.count == 1
    assert made.drafter.check(SAMPLED.but(draft="token-recycling:k=8")) == speculation.Speculation(None, None), "the engine's own"


def test_finished_texts_hold_no_drafter() -> None:
    made = engine()
    asked = [request(0, draft="token-recycling", n=2), request(1, draft="token-recycling", max_tokens=99)]
    made.add(asked[1])
    drive(made, asked[:1], [0])
    assert all(seq.speculation is None for one in asked for seq in one.sequences)


def test_one_is_opened_for_each_noise(made_up: dict[str, Registered]) -> None:
    made = engine()
    for _ in range(3):
        made.drafter.check(SAMPLED.but(draft="single"))
        made.drafter.check(SAMPLED.but(draft="single", verify="rejection"))
        made.drafter.check(SAMPLED.but(draft="single", verify="multi-candidate"))
    assert made_up["single"].opened == 2
    streams = {made.drafter.check(SAMPLED.but(draft="single", verify=v)).drafter.drafter.sampler.drafts for v in ("coupled", "rejection")}  # type: ignore[union-attr]
    assert streams == {Stream.TARGET, Stream.DRAFT}


def test_the_engines_own_serves_who_names_it() -> None:
    made = engine()
    spec = made.runner.spec
    named = Engine(made.runner, made.scheduler, NoDraft(), made.verifier.own, made.sampler, max_model_len=64, draft="none")
    assert named.drafter.check(SAMPLED.but(draft="none", verify="coupled")) == speculation.Speculation(None, None)
    assert not named.opened.count and spec.vocab == plain.VOCAB


# ---- refusals


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({"draft": "iid", "verify": "rejection"}, Unsupported, ("verifier rejection", "WITHOUT_REPLACEMENT", "which iid makes")),
        ({"draft": "draft-model"}, InvalidInput, ("draft-model",)),
        ({"draft": "token-recyclin"}, UnknownMethod, ("token-recycling",)),
        ({"verify": "couple"}, UnknownMethod, ("coupled",)),
        ({"draft": "token-recycling:k=x"}, InvalidInput, ("k",)),
        ({"draft": ""}, UnknownMethod, ()),
        ({"verify": ""}, UnknownMethod, ()),
    ],
)
def test_refusals_name_both_parts(params: dict[str, str], error: type[Exception], words: Seq[str]) -> None:
    made = engine()
    with pytest.raises(error) as refused:
        made.add(request(0, **params))
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)
    assert not made.has_work and not made.outputs


def test_a_drafter_made_by_hand_draws_with_one_noise() -> None:
    made = engine(lambda runner, sampler: Tossed(sampler, Kind.SINGLE))
    with pytest.raises(Unsupported, match="rejection needs another kind of noise than drafter Tossed draws with"):
        made.add(request(0, verify="rejection"))
    fixed = engine(RandomTrees(plain.VOCAB))
    fixed.add(request(0, verify="rejection"))
    fixed.abort("0")
