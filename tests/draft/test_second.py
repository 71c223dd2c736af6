"""The second model's cache follows the text through preemption, forks, aborts and rejections."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.plan import Budget
from redraft.core.sequence import Request, Sequence
from redraft.core.tree import TokenTree
from redraft.draft import second as module
from redraft.draft.second import SecondModel, SecondModelDrafter
from redraft.draft.sketch import NextDistribution, Sketch
from redraft.engine.engine import Engine
from redraft.errors import InvalidInput
from redraft.models.runner import Runner
from redraft.ops.backend import Linear
from redraft.sample.sampler import Sampler
from tests.contracts import plain
from tests.contracts.identity import SAMPLING, complete, drive, engine, expected, prompts, second

NAMES = [name for name in registry.METHODS["draft"] if complete("draft", name) and isinstance(registry.create("draft", name), SecondModel)]
CHAIN = next(iter(NAMES))


def method(name: str) -> SecondModel:
    made = registry.create("draft", name)
    assert isinstance(made, SecondModel)
    return made


def requests(sampling: str, count: int = 4, **changes: Any) -> list[Request]:
    return [Request(str(i), list(prompts()[i]), SAMPLING[sampling].but(seed=100 + i, **changes)) for i in range(count)]


def check_texts(texts: dict[str, list[int]], sampling: str) -> None:
    for name, text in texts.items():
        assert text == list(expected(None, prompts()[int(name)], sampling, 100 + int(name)))


class Rereading(SecondModelDrafter):
    """Compares each tree with the tree of a second model that reads the whole text again."""

    compared = 0

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        trees = super().propose(seqs, budgets)
        for seq, budget, tree in zip(seqs, budgets, trees, strict=True):
            if len(tree):
                runner = Runner(self.runner.spec, self.runner.weights, self.runner.backend, 10)
                fresh = SecondModelDrafter(self.method, runner, self.sampler)
                sibling = Sequence(
                    seq.id, seq.request, seq.index, seq.tokens, seq.prompt_len, seq.seed, seq.sync_point, state=dict(seq.state)
                )
                sibling.state[fresh] = fresh.begin(sibling)
                (again,) = fresh.propose([sibling], [budget])
                assert again.tokens.tolist() == tree.tokens.tolist() and again.parents.tolist() == tree.parents.tolist()
                self.compared += 1
        return trees


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pool", [40, 5])
def test_every_tree_is_that_of_a_model_that_reads_the_text_afresh(name: str, pool: int) -> None:
    def opener(runner: Runner, sampler: Sampler) -> SecondModelDrafter:
        made = second(method(name), runner, sampler)
        return Rereading(made.method, made.runner, sampler)

    made = engine(opener, pool=pool, chunk=24)
    seen = drive(made, requests("filtered"), (0, 0, 2, 5))
    check_texts(seen.texts, "filtered")
    assert made.drafter.own.drafter.compared > 20 and seen.accepted and seen.rejected  # type: ignore[attr-defined]
    assert bool(seen.preempted) == (pool == 5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_draft_model_that_is_the_target_is_always_right(name: str, sampling: str) -> None:
    seen = drive(engine(partial(second, method(name), off=0.0)), requests(sampling, 1), (0,))
    check_texts(seen.texts, sampling)
    lengths = 26 / seen.steps
    assert lengths > 2.5, "each level of a tree holds the target's own token"


def test_it_reads_a_long_prompt_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 8)
    rows: list[int] = []

    def opener(runner: Runner, sampler: Sampler) -> SecondModelDrafter:
        made = second(method(CHAIN), runner, sampler)
        forward = made.runner.forward
        made.runner.forward = lambda batch, taps: (rows.append(len(batch.tokens)), forward(batch, taps))[1]  # type: ignore
        return made

    made = engine(opener)
    made.add(requests("greedy", 1)[0])
    drafted = []
    while made.has_work:
        drafted += [event.stats.drafted for event in made.step()]
    assert max(rows) == 8 and rows[:5] == [8] * 5, "45 tokens are read eight at a time, while the target goes on"
    assert drafted[0] == drafted[1] == 0 < drafted[-1]


def test_a_text_longer_than_its_context_goes_on_without_drafts() -> None:
    made = engine(partial(second, method(CHAIN), context=50))
    seen = drive(made, requests("sampled", 3), (0, 0, 0))  # prompts of 45, 41 and 29 tokens, 26 new ones
    check_texts(seen.texts, "sampled")
    assert seen.accepted


@pytest.mark.parametrize(("blocks", "count", "accepts"), [(1, 1, False), (2, 1, True), (1, 4, True), (3, 4, True)])
def test_where_its_pool_is_full_it_stays_silent(blocks: int, count: int, accepts: bool) -> None:
    made = engine(partial(second, method(CHAIN), blocks=blocks))  # a page holds 32; prompts have 45, 41, 29 and 20 tokens
    seen = drive(made, requests("sampled", count), (0,) * count)
    check_texts(seen.texts, "sampled")
    assert bool(seen.accepted) == accepts


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pool", [40, 7])
def test_n_texts_and_aborts_leak_nothing(name: str, pool: int) -> None:
    made = engine(name, pool=pool)
    drafter = made.drafter.own.drafter
    assert isinstance(drafter, SecondModelDrafter)
    for request in requests("sampled", 3, n=3):
        made.add(request)
    for _ in range(6):
        made.step()
        drafter.memory.check()
    assert made.abort("1")
    drafter.memory.check()
    while made.has_work:
        made.step()
        drafter.memory.check()
    assert drafter.memory.used() == made.memory.used() == 0


@pytest.mark.parametrize("name", NAMES)
def test_whoever_asks_for_prompt_logprobs_gets_the_same_drafts(name: str) -> None:
    asked, plainly = engine(name), engine(name)
    seen = drive(asked, requests("sampled", prompt_logprobs=1), (0, 0, 0, 0))
    check_texts(seen.texts, "sampled")
    other = drive(plainly, requests("sampled"), (0, 0, 0, 0))
    assert (seen.accepted, seen.rejected) == (other.accepted, other.rejected)


def test_forks_draft_what_they_would_alone() -> None:
    alone, forked = engine(CHAIN), engine(CHAIN)
    (one,) = requests("sampled", 1, n=2)
    texts = drive(forked, [one], (0,)).texts
    assert texts["0/0"] == list(expected(None, prompts()[0], "sampled", 100)) != texts["0/1"]
    again = Request("again", list(prompts()[0]), one.params.but(n=1, seed=one.sequences[1].seed))
    assert drive(alone, [again], (0,)).texts["again"] == texts["0/1"]


@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_interrupt_between_proposal_and_commit_leaves_no_tail(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(CHAIN)
    forward, calls = made.runner.forward, 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(made.runner, "forward", interrupted)
    for request in requests("sampled"):
        made.add(request)
    assert finish(made, "sampled") == 1


@pytest.mark.parametrize("call", [1, 2, 3, 7])
def test_an_interrupt_while_it_drafts_leaves_no_tail(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(CHAIN)
    runner = made.drafter.own.drafter.runner  # type: ignore[attr-defined]
    forward, calls = runner.forward, 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        out = forward(*args)
        if calls == call:
            raise KeyboardInterrupt
        return out

    monkeypatch.setattr(runner, "forward", interrupted)
    for request in requests("sampled"):
        made.add(request)
    assert finish(made, "sampled") == 1


def finish(made: Engine, sampling: str) -> int:
    reported: dict[str, list[int]] = {}
    raised = 0
    while made.has_work:
        try:
            for event in made.step():
                reported.setdefault(event.request.id, []).extend(event.tokens)
                assert not event.stats.fault
        except KeyboardInterrupt:
            raised += 1
    check_texts(reported, sampling)
    table = made.drafter.own.drafter.memory.paged.table  # type: ignore[attr-defined]
    table.check()
    assert table.used() == 0
    return raised


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_who_drafts_is_not_confused_with_who_only_reads(sampling: str) -> None:
    """Two texts and room for one node a step: the text without a budget runs its row too, but gets no distribution."""
    made = engine(partial(second, method(CHAIN), off=0.0))
    made.scheduler = replace(made.scheduler, draft_total=1)  # type: ignore[type-var]
    seen = drive(made, requests(sampling, 2), (0, 0))
    check_texts(seen.texts, sampling)
    assert seen.accepted > 10 and not seen.rejected, "the draft model is the target"


def test_tokens_that_it_has_no_embedding_for_end_its_drafts() -> None:
    def opener(runner: Runner, sampler: Sampler) -> SecondModelDrafter:
        made = second(method(CHAIN), runner, sampler)
        weights = made.runner.weights
        small = replace(weights, embed=weights.embed[:15], head=Linear(weights.head.weight[:15]))
        return SecondModelDrafter(made.method, Runner(replace(made.runner.spec, vocab=15), small, made.runner.backend, 40), sampler)

    made = engine(opener)
    tokens = [token for token in prompts()[0] if token < 15]
    params = SAMPLING["sampled"].but(seed=1, logit_bias=dict.fromkeys(range(15, plain.VOCAB), -100.0))
    made.add(Request("known", tokens, params))
    made.add(Request("unknown", [*tokens, 20], params))
    stats = {}
    while made.has_work:
        for event in made.step():
            stats[event.request.id] = event.stats
    assert stats["known"].drafted and not stats["unknown"].drafted
    assert not any(one.fault for one in stats.values())


def test_two_drafters_may_share_the_model() -> None:
    made = engine(CHAIN)
    one = made.drafter.own.drafter
    assert isinstance(one, SecondModelDrafter)
    other = SecondModelDrafter(one.method, one.runner, one.sampler)
    seq = Sequence(1, requests("greedy", 1)[0], 0, [1, 2, 3], 3, 1, 99)
    states = [one.begin(seq), other.begin(seq), other.fork(one.begin(seq), seq)]
    assert len({state.seq.id for state in states}) == 3
    for state in states:
        one.end(state)


@pytest.mark.parametrize("place", ["move", "attach"])
def test_a_sibling_that_cannot_begin_is_freed(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(CHAIN)
    drafter = made.drafter.own.drafter
    assert isinstance(drafter, SecondModelDrafter)

    def fails(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(drafter.memory.paged.store if place == "move" else drafter.memory.paged.table, place, fails)
    seq = Sequence(1, requests("greedy", 1)[0], 0, [1, 2, 3], 3, 1, 99)
    if place == "move":
        state = drafter.begin(seq)
        with pytest.raises(KeyboardInterrupt):
            drafter.fork(state, seq)
        drafter.end(state)
    else:
        with pytest.raises(KeyboardInterrupt):
            drafter.begin(seq)
    assert not drafter.memory.paged.table._held


# ---- distributions and sketches


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0, 1])
def test_where_no_token_has_mass_nothing_is_drafted(name: str, temperature: float) -> None:
    made = sketch(values=np.full(plain.VOCAB, -np.inf), temperature=temperature)
    for _ in method(name).grow(made):
        assert not made.tokens
    assert not made.tokens


def test_where_coins_weigh_it_no_child_has_a_probability_of_zero() -> None:
    values = np.array([0.0, -500.0, -800.0, -1e5])
    coins = NextDistribution(np.arange(4), values, 3, target=False)
    assert coins.ids.tolist() == [0, 1] and (np.exp(coins.logq) > 0).all()
    assert len(NextDistribution(np.arange(4), values, 3, target=True).best(4)) == 4, "the target's own noise weighs nothing"


def distribution(seed: int = 1, target: bool = False, noise: int | None = 7) -> NextDistribution:
    values = np.random.default_rng(seed).normal(size=50)
    return NextDistribution(np.arange(50), values, noise, target=target)


@pytest.mark.parametrize("candidates", [1, 3, 99])
def test_children_are_drawn_from_the_likeliest_candidates(candidates: int) -> None:
    counts: set[int] = set()

    class Watched(SecondModelDrafter):
        def _forward(self, *args: Any, **options: Any) -> Any:
            few = super()._forward(*args, **options)
            for row, _ in few or []:
                counts.add(int((row > -np.inf).sum()))
            return few

    def opener(runner: Runner, sampler: Sampler) -> SecondModelDrafter:
        made = second(registry.create("draft", f"{CHAIN}:candidates={candidates}"), runner, sampler)
        return Watched(made.method, made.runner, sampler)

    seen = drive(engine(opener), requests("sampled"), (0, 0, 2, 5))
    check_texts(seen.texts, "sampled")
    assert counts == {min(candidates, plain.VOCAB)} and seen.accepted


def test_one_candidate_is_the_likeliest_token() -> None:
    greedy = drive(engine(CHAIN), requests("greedy"), (0, 0, 2, 5))
    one = drive(engine(f"{CHAIN}:candidates=1"), requests("greedy"), (0, 0, 2, 5))
    assert (one.accepted, one.rejected) == (greedy.accepted, greedy.rejected)


def test_a_distribution_sums_to_one_over_what_has_mass() -> None:
    values = np.array([0.0, -np.inf, 1.0])
    assert (
        np.exp(distribution().logq).sum() == pytest.approx(1) == np.exp(NextDistribution(np.arange(3), values, 1, target=False).logq).sum()
    )
    nothing = NextDistribution(np.arange(3), np.full(3, -np.inf), 1, target=False)
    assert nothing.best(2) == nothing.likeliest(2) == nothing.samples([0, 1]) == [] and nothing.nth(0) is None


def test_best_is_a_prefix_of_one_order_and_skips_what_has_no_mass() -> None:
    one = distribution()
    assert [one.nth(i) for i in range(50)] == one.best(50) and one.nth(50) is None
    values = np.array([0.0, -np.inf, 1.0])
    few = NextDistribution(np.arange(3), values, 5, target=False)
    assert sorted(few.ids[few.best(3)]) == [0, 2] and few.nth(2) is None and few.ids[few.likeliest(3)].tolist() == [2, 0]


def test_samples_follow_the_distribution_and_number_0_the_targets_noise() -> None:
    counts = np.zeros(50)
    for noise in range(400):
        for place in distribution(noise=noise).samples(range(10)):
            counts[place] += 1
    q = np.exp(distribution().logq)
    assert ((counts - 4000 * q) ** 2 / (4000 * q)).sum() < 49 + 5 * np.sqrt(2 * 49)
    assert all(distribution(noise=n, target=True).samples([0]) == distribution(noise=n).best(1) for n in range(20))
    assert distribution(noise=None).samples([0, 1, 2]) == distribution(noise=None).best(1) * 3


def sketch(values: np.ndarray | None = None, **changes: Any) -> Sketch:
    sampler = Sampler(plain.VOCAB, frozenset({3}))
    request = Request("r", [1, 2], SamplingParams(seed=1, **changes))
    seq = Sequence(0, request, 0, [1, 2], 2, 1, 99)
    seq.state[sampler] = sampler.begin(seq)
    made = Sketch(seq, Budget(4, 2), method(CHAIN).kind, sampler)
    made.learn(-1, np.zeros(plain.VOCAB) if values is None else values)
    return made


@pytest.mark.parametrize("ignore", [False, True])
def test_nothing_grows_behind_the_end_of_the_text(ignore: bool) -> None:
    made = sketch(ignore_eos=ignore)
    end, other = made.add(-1, 3), made.add(-1, 4)
    assert made.open(-1) and made.open(other) and made.open(end) == ignore


def test_nothing_grows_deeper_than_the_budget_and_a_token_is_one_node() -> None:
    made = sketch()
    first = made.add(-1, 5)
    assert made.add(-1, 5) == first and made.draws == [first, first] and made.room == 3
    made.learn(first, np.zeros(plain.VOCAB))
    assert not made.open(made.add(first, 6))
    assert made.scores == pytest.approx([1 / plain.VOCAB, 1 / plain.VOCAB**2])


@pytest.mark.parametrize("option", ["candidates=-1", "candidates=x"])
@pytest.mark.parametrize("name", NAMES)
def test_options_are_checked(name: str, option: str) -> None:
    with pytest.raises(InvalidInput, match="candidates"):
        registry.create("draft", f"{name}:{option}")


@pytest.mark.parametrize("noise", [None, 7])
def test_a_distribution_of_no_numbers_is_reported(noise: int | None) -> None:
    """A draft model computes NaN. The guard then drops the drafter, and the text continues."""
    distribution = NextDistribution(np.arange(3), np.array([1.0, 2.0, 3.0]), noise, target=True, total=np.nan)
    with pytest.raises(ValueError, match="NaN"):
        distribution.nth(0)
