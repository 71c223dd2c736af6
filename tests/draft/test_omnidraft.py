"""Drafts of a model with other tokens: what they are translated to, and whose text the draft model reads."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import pairwise
from string import ascii_lowercase
from typing import Any, ClassVar

import pytest

from redraft import LLM, SamplingParams, registry
from redraft.core.plan import Accepted, Budget
from redraft.core.sequence import Request, Sequence
from redraft.core.tree import TokenTree
from redraft.draft.draft_model import DraftModel
from redraft.draft.omnidraft import Grams, OmniDraft, Spelled, Translator, Words
from redraft.draft.sketch import Sketch
from redraft.engine.engine import Engine
from redraft.errors import InvalidInput
from redraft.models.runner import Runner
from redraft.ops.arrays import array
from redraft.ops.backend import Linear
from redraft.sample.sampler import Sampler
from tests.contracts.identity import SAMPLING, drive, engine, expected, prompts
from tests.contracts.plain import VOCAB

LETTERS = [Spelled(letter.encode(), False) for letter in ascii_lowercase[:VOCAB]]
PAIRS = [*LETTERS[:12], *(Spelled(one.bytes + two.bytes, False) for one, two in pairwise(LETTERS[:13]))]
FEW = [*LETTERS[:13], *[Spelled(b" " if at == 13 else b"", False) for at in range(13, VOCAB)]][::-1]
BACKWARDS = LETTERS[::-1]


class Checked(Translator):
    """Compares the bytes of both texts whenever it drafts."""

    drafts = 0

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        trees = super().propose(seqs, budgets)
        for seq, tree in zip(seqs, trees, strict=True):
            own = seq.state[self].seq.tokens
            assert self.words.written(own) == b"".join(self.words.target[token].bytes for token in seq.tokens)
            self.drafts += len(tree) > 0
        return trees


def split(text: str) -> list[int]:
    """No tokenizer's: Words then takes the longest tokens."""
    return []


def made(target: Seq[Spelled], draft: Seq[Spelled], *, pool: int = 40, cached: int = 100, **options: Any) -> tuple[Engine, Checked]:
    """The draft model is the target with the rows of its vocabulary in reverse order."""

    def opener(runner: Runner, sampler: Sampler) -> Checked:
        place, head = runner.backend.place, array(runner.weights.head.weight)
        embed = array(runner.weights.embed)
        if target != draft:
            embed, head = embed[::-1].copy(), head[::-1].copy()
        weights = replace(runner.weights, embed=place(embed), head=Linear(place(head)))
        own = Runner(runner.spec, weights, runner.backend, runner.memory.blocks)
        return Checked(OmniDraft(model="some", cached=cached), own, Words(target, draft, split))

    found = engine(opener, pool=pool, chunk=24, **options)
    return found, found.drafter.own.drafter  # type: ignore[return-value]


def requests(sampling: str, count: int = 4) -> list[Request]:
    return [Request(str(i), list(prompts()[i]), SAMPLING[sampling].but(seed=100 + i)) for i in range(count)]


def right(texts: dict[str, list[int]], sampling: str) -> bool:
    return all(text == list(expected(None, prompts()[int(name)], sampling, 100 + int(name))) for name, text in texts.items())


@pytest.mark.parametrize(("sampling", "pool"), [("greedy", 40), ("filtered", 5)])
def test_any_cache_keeps_the_text(sampling: str, pool: int) -> None:
    """Tokens of two letters, and a draft model of single ones. The cache also has entries that are wrong."""
    one, drafter = made(PAIRS, FEW, pool=pool)
    for gram in ((23, 22), (20, 20), (23, 22, 21)):
        drafter.grams.add(gram, 5)
    seen = drive(one, requests(sampling), (0, 0, 2, 5))
    assert right(seen.texts, sampling)
    assert drafter.drafts > 10 and seen.rejected
    assert bool(seen.preempted) == (pool == 5)
    assert (23, 22) in drafter.grams.known and len(drafter.grams.known) > 5, "n-grams are learned"


def test_a_draft_model_that_is_the_target_in_other_words_is_always_right() -> None:
    one, drafter = made(LETTERS, BACKWARDS)
    seen = drive(one, requests("greedy", 2), (0, 0))
    assert right(seen.texts, "greedy")
    assert seen.accepted > 30 and seen.steps < 20
    assert drafter.drafts and not drafter.grams.known


def test_with_the_same_tokens_nothing_is_translated() -> None:
    one, drafter = made(PAIRS, PAIRS)
    seen = drive(one, requests("greedy", 2), (0, 0))
    assert right(seen.texts, "greedy") and seen.steps < 20
    assert drafter.words.partners == {token: token for token in range(VOCAB)}


def test_aborted_and_forked_texts_hold_no_pages() -> None:
    one, drafter = made(PAIRS, FEW)
    for i, request in enumerate(requests("sampled", 3)):
        one.add(Request(request.id, request.prompt, request.params.but(n=1 + i)))
    for _ in range(5):
        one.step()
        drafter.memory.check()
    assert one.abort("1")
    while one.has_work:
        one.step()
        drafter.memory.check()
    assert drafter.memory.used() == one.memory.used() == 0


def test_the_longest_n_gram_is_taken_first() -> None:
    grams = Grams(3)
    for gram, token in {(1, 2): 10, (1, 2, 3): 11, (4, 5): 12}.items():
        grams.add(gram, token)
    partners = {1: 101, 2: 102, 3: 103}
    assert grams.translate([1, 2, 3, 1, 2, 2, 9, 1], partners) == ([11, 10, 102], [3, 5, 6]), "9 has no partner, and ends the draft"
    assert grams.translate([1, 3, 4], partners) == ([101, 103], [1, 2])
    grams.add((6, 7), 13)
    assert (1, 2) not in grams.known and len(grams.known) == 3, "the oldest was dropped"


def test_special_tokens_are_partners_of_special_tokens_only() -> None:
    words = Words(
        [Spelled(b"</s>", True), Spelled(b"a", False), Spelled(b"a", False)], [Spelled(b"</s>", False), Spelled(b"a", False)], split
    )
    assert words.partners == {1: 1}


def test_texts_keep_their_bytes() -> None:
    draft = [Spelled(text, False) for text in (b"a", b"ab", "ü".encode(), b"\xc3", b"\xbc")]
    words = Words(draft[:1], draft, lambda text: [0] * len(text))
    assert words.tokens(b"aa") == [0, 0]
    assert words.tokens("abü".encode()) == [1, 2], "its tokenizer changes this one"
    assert words.tokens(b"\xbc\xc3") == [4, 3]
    assert words.tokens(b"b") is None


def test_the_last_word_is_tokenized_again() -> None:
    """Tokens " a" and "b" of the target are " ab" of the draft."""
    target = [Spelled(text, False) for text in (b" a", b"b", b"c")]
    draft = [Spelled(text, False) for text in (b" ", b"a", b" ab", b"b", b"c", b" a")]
    _, drafter = made(LETTERS, BACKWARDS)
    drafter.words = Words(target, [*draft, *[Spelled(b"", False)] * 18], split)
    seq = Sequence(1, Request("1", [2, 0], SamplingParams()), 0, [2, 0], 2, 1, 99)
    seq.state[drafter] = state = drafter.begin(seq)
    assert state.seq.tokens == [4, 5]
    super(Checked, drafter).propose([seq], [Budget(4, 4)])
    drafter._commit([state.work], [Accepted()])
    assert state.seq.stored == 2
    seq.tokens += [1, 2]
    assert drafter._follow(state, seq)
    assert state.seq.tokens == [4, 2, 4] and state.seq.stored == 0, "its keys are computed again"
    drafter.end(state)
    assert drafter.memory.used() == 0


def test_real_tokenizers_of_one_vocabulary() -> None:
    llm = LLM("embedded", cache_memory=1 << 25, draft="none")
    params = SamplingParams(temperature=0, max_tokens=16)
    (plain,) = llm.generate(["def add(a, b):"], params)
    other = llm.sibling(draft="omnidraft:model=embedded-draft")
    (drafted,) = other.generate(["def add(a, b):"], params)
    assert drafted.outputs[0].token_ids == plain.outputs[0].token_ids
    assert drafted.outputs[0].stats.accepted and not drafted.outputs[0].stats.fault


def test_what_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"^omnidraft:model=none: must be a model with a tokenizer"):
        registry.create("draft", "omnidraft")


class Prophet(DraftModel):
    """Drafts the letters that come."""

    letters: ClassVar[list[int]] = []

    def grow(self, tree: Sketch) -> Iterator[None]:
        node = -1
        for letter in self.letters[len(tree.seq.tokens) :][: min(self.length, tree.room)]:
            node = tree.add(node, letter)
            yield


def test_n_grams_are_accepted_where_single_tokens_have_no_partner() -> None:
    """A draft model that is always right about letters. Half of the target's tokens have two."""
    found = []
    for cached in (0, 100):
        one, drafter = made(PAIRS, FEW, cached=cached)
        drafter.method = prophet = Prophet(model="some", length=8)
        text = [*prompts()[2], *expected(None, prompts()[2], "greedy", 102)]
        letters = drafter.words.translated(b"", text)
        assert letters is not None
        type(prophet).letters = letters
        request = Request("2", list(prompts()[2]), SAMPLING["greedy"].but(seed=102))
        seen = drive(one, [request], (0,))
        assert right(seen.texts, "greedy")
        found.append(seen)
    assert found[1].accepted > found[0].accepted and found[1].steps < found[0].steps
