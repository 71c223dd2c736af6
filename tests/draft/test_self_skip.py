"""Drafts with some of the target's layers: their tokens, that they do not change texts, and that they leave nothing behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.plan import Budget
from redraft.core.sequence import Request, Sequence
from redraft.core.tree import TokenTree
from redraft.draft.self_skip import SelfSkip, Skipping
from redraft.engine.engine import Engine
from redraft.engine.output import checked
from redraft.errors import InvalidInput
from redraft.ops.arrays import array
from tests.contracts import plain
from tests.contracts.algebra import LEAST_P, chi_square_p
from tests.contracts.identity import SAMPLING, Run, drive, prompts
from tests.layer_skipping.deep import ALL, deep, engine, logits, requests


@cache
def expected(number: int, sampling: str, power: float = 0.3) -> list[int]:
    return plain.generate(*deep(power), prompts()[number], SAMPLING[sampling], seed=100 + number)


def check_texts(seen: Run, sampling: str, power: float = 0.3) -> None:
    for name, text in seen.texts.items():
        assert text == expected(int(name), sampling, power)


# ---- the layers


def test_layers_are_spaced_evenly() -> None:
    assert sorted(SelfSkip(skip=4).layers(8)) == [0, 2, 5, 7]
    for count in range(3, 40):
        for skip in range(count - 1):
            kept = sorted(SelfSkip(skip=skip).layers(count))
            steps = np.diff(kept)
            assert kept[0] == 0 and kept[-1] == count - 1 and len(kept) == count - skip and steps.max() - steps.min() <= 1


@pytest.mark.parametrize(("count", "skipped"), [(3, 1), (4, 1), (8, 3), (32, 15)])
def test_half_of_the_layers_between_are_left_out_unless_reported(count: int, skipped: int) -> None:
    assert len(SelfSkip().layers(count)) == count - skipped


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("skip=-1", "skip=-1: must be 0"),
        ("length=0", "length=0: must be 1"),
        ("stop=1.5", "stop=1.5: must be 0 to 1"),
        ("candidates=-1", ""),
    ],
)
def test_bad_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=f"self-skip:{message}"):
        registry.create("draft", f"self-skip:{text}")


@pytest.mark.parametrize(
    ("skip", "count", "message"), [(7, 8, "skip=7: the target has 8 layers.*0 to 6 is"), (None, 2, "has 2.*3 layers or more")]
)
def test_a_target_with_too_few_layers_is_refused_by_figures(skip: int | None, count: int, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        SelfSkip(skip=skip).layers(count)


# ---- the drafts


class Redrafting(Skipping):
    """Compares each chain with a dense computation: committed rows run their own layers, the last token and the chain skip some."""

    compared = deepest = 0

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        trees = super().propose(seqs, budgets)
        for seq, tree in zip(seqs, trees, strict=True):
            tokens = list(seq.tokens)
            behind = ALL if seq.layers is None else seq.layers.attention
            runs = [ALL] * seq.context + [behind] * (seq.stored - seq.context)
            for token in tree.tokens.tolist():
                row = logits(tokens, [*runs[: seq.stored], *[self.layers.attention & behind] * (len(tokens) - seq.stored)])[-1]
                drawn, margin = plain.draw(row, seq.params, seq.seed, tokens)
                assert token == drawn or margin < 1e-9
                tokens.append(token)
                self.compared += 1
            self.deepest = max(self.deepest, len(tree))
        return trees


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("sampling", ["greedy", "filtered"])
@pytest.mark.parametrize("depth", ["none", "layer-skip:speedup=1.5"])
def test_every_draft_is_what_the_kept_layers_say_and_the_text_is_the_plain_one(backend: str, sampling: str, depth: str) -> None:
    made = engine(lambda *above: Redrafting(SelfSkip(skip=2), *above), backend=backend)
    few = SAMPLING[sampling].but(max_tokens=14)
    both = [*requests(few.but(depth=depth), 1), *requests(few, 1, first=1)]
    seen = drive(made, both, (0, 2))
    drafter = made.drafter.own.drafter
    assert isinstance(drafter, Redrafting) and drafter.compared > 18 and drafter.deepest == 4
    assert seen.accepted and seen.rejected
    alone = drive(engine(backend=backend), [Request("0", list(prompts()[0]), both[0].params)], (0,))
    assert seen.texts["0"] == alone.texts["0"] and seen.texts["1"] == expected(1, sampling)[:14]
    assert (seen.texts["0"] == expected(0, sampling)[:14]) == (depth == "none")


@pytest.mark.parametrize(("arrivals", "chunk", "pool"), [((0, 1, 3, 3), 24, 40), ((0, 0, 2, 5), 24, 6), ((0,) * 4, 512, 7)])
@pytest.mark.parametrize("skip", [2, 4])
def test_chunks_batches_and_preemption_change_nothing(arrivals: tuple[int, ...], chunk: int, pool: int, skip: int) -> None:
    made = engine(SelfSkip(skip=skip, length=6).open, chunk=chunk, pool=pool)
    seen = drive(made, requests(SAMPLING["filtered"]), arrivals)
    check_texts(seen, "filtered")
    assert seen.accepted and seen.rejected and bool(seen.preempted) == (pool < 40)


@pytest.mark.parametrize("verify", ["coupled", "rejection"])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize(("skip", "power"), [(0, 0.3), (4, 0.0)])
def test_layers_that_change_nothing_are_not_missed(verify: str, sampling: str, skip: int, power: float) -> None:
    """If no layer is skipped, or skipped layers do not change the hidden state, the drafts are the target's own tokens."""
    made = engine(SelfSkip(skip=skip).open, verify=verify, power=power)
    seen = drive(made, requests(SAMPLING[sampling], 2), (0, 0))
    assert not seen.rejected and seen.accepted == 2 * 20, "26 tokens, five a step"
    if verify == "coupled" or sampling == "greedy":
        check_texts(seen, sampling, power)


DISTRIBUTION = SamplingParams(temperature=1.3, top_k=3, max_tokens=3)


@cache
def distribution() -> dict[tuple[int, int], float]:
    """The probability of every text of two tokens after prompt 3."""

    def following(text: tuple[int, ...]) -> list[tuple[tuple[int, ...], float]]:
        x = plain.logits(*deep(), [*prompts()[3], *text])[-1]
        best = np.argsort(-x, kind="stable")[: DISTRIBUTION.top_k]
        weigh = np.exp((x[best] - x[best].max()) / DISTRIBUTION.temperature)
        return [((*text, int(token)), float(w)) for token, w in zip(best, weigh / weigh.sum(), strict=True)]

    return {(two[0], two[1]): a * b for one, a in following(()) for two, b in following(one)}


class OtherDistributions(Skipping):
    """A fault: the chain is drawn with one set of layers, but reported with the distributions of another set."""

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        trees = super().propose(seqs, budgets)
        whole = Skipping(SelfSkip(skip=0, length=1), self.runner, self.sampler)
        return [replace(tree, distributions=one.distributions) for tree, one in zip(trees, whole.propose(seqs, budgets), strict=True)]


@pytest.mark.parametrize("fault", [False, True])
def test_under_rejection_the_distribution_is_the_targets(fault: bool) -> None:
    """400 texts. The test detects drafts that are reported with wrong distributions."""
    method = SelfSkip(skip=4, length=1)
    made = engine(lambda *above: (OtherDistributions if fault else Skipping)(method, *above), verify="rejection", pool=80)
    made.scheduler = replace(made.scheduler, max_seqs=40, draft_total=200)  # type: ignore[type-var]
    asked = [Request(str(i), list(prompts()[3]), DISTRIBUTION.but(seed=i)) for i in range(400)]
    seen = drive(made, asked, [0] * len(asked), check=False)
    counts = Counter((text[0], text[1]) for text in seen.texts.values())
    texts = sorted(distribution())
    p = chi_square_p(np.array([counts[text] for text in texts]), len(asked) * np.array([distribution()[text] for text in texts]))
    assert seen.accepted and seen.rejected and sum(counts.values()) == sum(counts[text] for text in texts)
    assert (p < LEAST_P) == fault


# ---- what it does not do


def drafting(made: Engine) -> Skipping:
    drafter = made.drafter.own.drafter
    assert isinstance(drafter, Skipping)
    return drafter


class Forwards:
    """Counts calls of Runner.forward. fails: the exception that it raises after forward number `at`."""

    def __init__(self, made: Engine, at: int = 0, fails: type[BaseException] = RuntimeError) -> None:
        self.batches: list[Any] = []
        forward = made.runner.forward

        def counted(batch: Any, taps: Any) -> Any:
            self.batches.append(batch)
            out = forward(batch, taps)
            if len(self.batches) == at:
                raise fails
            return out

        made.runner.forward = counted  # type: ignore[method-assign]


def test_a_step_costs_a_forward_for_each_drafted_token_and_one_more() -> None:
    made = engine(SelfSkip(skip=4).open)
    forwards = Forwards(made)
    seen = drive(made, requests(SAMPLING["greedy"].but(max_tokens=100), 1), (0,))
    skipping = [batch for batch in forwards.batches if batch.layers != [None]]
    assert len(forwards.batches) - len(skipping) == seen.steps
    assert len(skipping) == seen.accepted + seen.rejected == sum(len(batch.tokens) for batch in skipping)


def test_who_reads_the_prompt_or_has_no_budget_does_not_draft() -> None:
    made = engine(SelfSkip().open, chunk=16)
    (request,) = requests(SAMPLING["greedy"], 1)
    made.add(request)
    made.step()
    (seq,) = request.sequences
    forwards = Forwards(made)
    assert seq.pending > 1 and not len(drafting(made).propose([seq], [Budget(4, 4)])[0])
    while seq.pending > 1:
        made.step()
    del forwards.batches[:]
    for budget in (Budget(0, 4), Budget(4, 0)):
        assert not len(drafting(made).propose([seq], [budget])[0])
    assert not forwards.batches
    for rows, depth in ((2, 9), (9, 2)):
        assert len(drafting(made).propose([seq], [Budget(rows, depth)])[0]) == 2
    made.memory.check()


@pytest.mark.parametrize("at", [1, 2, 5, 6, 9])
@pytest.mark.parametrize("fails", [RuntimeError, KeyboardInterrupt])
def test_what_raises_while_it_drafts_leaves_no_tail(at: int, fails: type[BaseException]) -> None:
    made = engine(SelfSkip().open)
    for request in requests(SAMPLING["sampled"]):
        made.add(request)
    texts: dict[str, list[int]] = {}
    forwards, raised = None, 0
    while made.has_work:
        if forwards is None and all(seq.pending == 1 for seq in made.running) and made.running:
            forwards = Forwards(made, at=at, fails=fails)  # forwards 1 to 4 draft, 5 verifies, 6 and on draft again
        try:
            for event in checked(made.step()):
                texts.setdefault(event.request.id, []).extend(event.tokens)
                assert not event.stats.fault, "asked again, each alone, all of them draft"
        except (RuntimeError, KeyboardInterrupt):
            raised += 1
        made.memory.check()
        assert all(held.chain == 0 for held in made.memory.paged.table._held.values())
    assert raised == (fails is KeyboardInterrupt), "an Exception of the verifying forward is repeated, and ends nothing"
    assert made.memory.used() == 0
    assert texts == {str(i): expected(i, "sampled") for i in range(4)}


def test_a_tail_that_stayed_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(SelfSkip().open)
    (request,) = requests(SAMPLING["greedy"], 1)
    made.add(request)
    while not (request.sequences and request.sequences[0].pending == 1):
        made.step()
    monkeypatch.setattr(made.memory.paged.table, "discard", lambda seq: None)
    with pytest.raises(AssertionError, match="tail of"):
        checked(made.step())


def test_n_texts_and_aborts_leak_nothing() -> None:
    made = engine(SelfSkip().open, pool=12)
    for request in requests(SAMPLING["sampled"].but(n=2), 3):
        made.add(request)
    for _ in range(5):
        made.step()
    assert made.abort("1")
    while made.has_work:
        for event in made.step():
            assert not event.stats.fault
        made.memory.check()
    assert made.memory.used() == 0


def test_pages_are_taken_from_what_the_step_was_promised() -> None:
    """Three texts need five pages, but there are four: no draft may take a page that another text needs to continue."""
    made = engine(SelfSkip(length=8).open, pool=4)
    seen = drive(made, requests(SAMPLING["greedy"], 3, first=2), (0, 0, 0))
    check_texts(seen, "greedy")
    assert seen.accepted and seen.preempted


def test_fresh_pages_are_zeroed() -> None:
    """0 times an old NaN is NaN: unwritten pages of this pool contain NaN."""
    found = []
    for left in (0.0, float("nan")):
        made = engine(SelfSkip(skip=4, length=6).open)
        made.memory.paged.store.pool.data[:] = left
        found.append(drive(made, requests(SAMPLING["sampled"], 3), (0, 0, 0)))
        check_texts(found[-1], "sampled")
    assert found[0].accepted and (found[0].accepted, found[0].rejected) == (found[1].accepted, found[1].rejected)


# ---- its options


def test_it_stops_where_it_is_unsure() -> None:
    seen = drive(engine(SelfSkip(stop=0.0).open), requests(SAMPLING["greedy"], 1), (0,))
    check_texts(seen, "greedy")
    assert seen.rejected and 26 - seen.accepted - 2 <= seen.accepted + seen.rejected <= 26 - seen.accepted, "one token a step"


def test_it_stops_at_the_end_of_a_text() -> None:
    trees: list[TokenTree] = []

    class Noted(Skipping):
        def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
            trees.extend(super().propose(seqs, budgets))
            return trees[-len(seqs) :]

    ended = 0
    for place in range(8, 13):  # wherever it lies in its chain
        end = expected(0, "greedy")[place]
        drive(engine(lambda *above: Noted(SelfSkip(skip=0), *above), eos=(end,)), requests(SAMPLING["greedy"], 1), (0,))
        assert all(end not in tree.tokens[:-1] for tree in trees)
        ended += trees[-1].tokens[-1] == end
        trees.clear()
    assert ended >= 3


def test_a_trimmed_head_drafts_its_tokens_only_and_leaves_the_targets_alone() -> None:
    made = engine(SelfSkip(skip=2).open)
    keep, head = np.arange(0, plain.VOCAB, 2), made.runner.weights.head.weight
    drafting(made).trim(keep)
    drafted: set[int] = set()
    propose = made.drafter.own.drafter.propose

    def noted(seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        trees = propose(seqs, budgets)
        drafted.update(token for tree in trees for token in tree.tokens.tolist())
        return trees

    made.drafter.own.drafter.propose = noted  # type: ignore[method-assign]
    seen = drive(made, requests(SAMPLING["sampled"], 2), (0, 0))
    check_texts(seen, "sampled")
    assert seen.accepted and drafted <= set(keep.tolist()) and np.array_equal(array(made.runner.weights.head.weight), array(head))


def test_one_candidate_is_the_likeliest_token() -> None:
    greedy = drive(engine(SelfSkip().open), requests(SAMPLING["greedy"]), (0,) * 4)
    one = drive(engine(SelfSkip(candidates=1).open), requests(SAMPLING["greedy"]), (0,) * 4)
    assert (one.accepted, one.rejected) == (greedy.accepted, greedy.rejected)
