"""A draft model with a tokenizer of its own: what it drafts is translated into the target's tokens.

Ramchalam Kinattinkara Ramakrishnan, Zhaocong Yuan, Shaojie Zhuo, Chen Feng, et al.: OmniDraft: A Cross-vocabulary, Online Adaptive
Drafter for On-device Speculative Decoding, 2025, arXiv 2507.02659.

1. A token of the target maps to the draft's token with the same bytes, special tokens to special ones.
2. When a prompt has or the target writes a token without such a partner, the draft's tokens of its bytes enter a cache of n-grams.
3. The draft model extends its text by the likeliest tokens. From left to right, the longest n-gram of the cache becomes its token of the
   target, else the token's partner. A token with neither ends the draft.
4. After the step the draft model's last word is tokenized again with what the target wrote, and its keys are kept up to the first
   difference.

Differs: the cache learns from prompts too. Drafts are greedy and carry no probabilities, so that every verifier keeps what it guarantees.
The draft model is not trained here, and no head predicts the length. A text that the draft's tokenizer would change is split into its
longest tokens instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.noise import Stream
from redraft.core.plan import Budget, StepResult
from redraft.core.sequence import Sequence
from redraft.core.tree import F64, I64, Kind, TokenTree
from redraft.draft.draft_model import DraftModel
from redraft.draft.second import DraftState, SecondModelDrafter, mirror
from redraft.draft.sketch import Sketch
from redraft.errors import InvalidInput
from redraft.models.tokenizer import Tokenizer
from redraft.options import Options, number

AGAIN = 12  # the most tokens of the draft that are tokenized again
ENTRY = 256  # bytes that an n-gram of the cache takes, about


@dataclass(frozen=True)
class OmniDraft(Options):
    """model: the draft model's folder, GGUF file or hub id, with its tokenizer; length: the most tokens of the draft a step; stop: see
    draft-model; cached: the most n-grams, the oldest are dropped."""

    model: str | None = None
    length: int = number(8, ge=1)
    stop: float = number(1.0, ge=0, le=1)
    cached: int = number(1 << 15, ge=0)

    card: ClassVar[Card] = Card(
        "OmniDraft",
        "Ramakrishnan, Yuan, Zhuo, Feng, et al., OmniDraft: A Cross-vocabulary, Online Adaptive Drafter for On-device Speculative "
        "Decoding, 2025, arXiv 2507.02659",
        Guarantee.SAME_TEXT,
        needs="a draft model with any tokenizer",
        deviates="drafts greedily and without training; the cache learns from prompts too",
        summary="A model with other tokens drafts; when no other fits",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            raise InvalidInput("omnidraft:model=none: must be a model with a tokenizer, which may be another one than the target's")

    def open(self, runner: Any, sampler: Any) -> Translator:
        from redraft.models.draft_model import load_draft_model  # imports torch, which `redraft methods` does not need

        own = load_draft_model(runner, self.model, translated=True)
        if runner.source is None or own.source is None:
            raise InvalidInput("omnidraft: needs a target with a tokenizer")
        target, draft = Tokenizer(runner.source), Tokenizer(own.source)
        words = Words(spelled(target, sampler.vocabulary.size), spelled(draft, own.spec.vocab), Encoder(draft), draft.first)
        return Translator(self, own, words)


class Spelled(NamedTuple):
    """A token's bytes, none for an id without text, and whether it is special."""

    bytes: bytes
    special: bool


def spelled(tokenizer: Tokenizer, vocab: int) -> list[Spelled]:
    """Of the tokens 0..vocab-1."""
    special = set(tokenizer.left_out)
    return [Spelled(tokenizer.bytes_of(token), token in special) for token in range(vocab)]


@dataclass(frozen=True)
class Encoder:
    tokenizer: Tokenizer

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, special=False)


@dataclass(frozen=True, eq=False)
class Words:
    """Two vocabularies. encode: text to tokens of the draft; first: the draft's tokens before every text."""

    target: Seq[Spelled]
    draft: Seq[Spelled]
    encode: Callable[[str], list[int]]
    first: Seq[int] = ()

    @cached_property
    def same(self) -> bool:
        return list(self.target) == list(self.draft)

    @cached_property
    def partners(self) -> dict[int, int]:
        """Draft's token -> target's."""
        if self.same:
            return {token: token for token in range(len(self.draft))}
        by_bytes = {one: token for token, one in reversed(list(enumerate(self.target))) if one.bytes}
        return {token: by_bytes[one] for token, one in enumerate(self.draft) if one in by_bytes}

    @cached_property
    def alone(self) -> frozenset[Spelled]:
        """What a single token of the draft stands for."""
        return frozenset(self.draft)

    @cached_property
    def _by_bytes(self) -> Mapping[bytes, int]:
        return {one.bytes: token for token, one in reversed(list(enumerate(self.draft))) if one.bytes and not one.special}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._by_bytes), default=0)

    def written(self, tokens: Seq[int]) -> bytes:
        """The bytes of tokens of the draft, but for those before every text."""
        return b"".join(self.draft[token].bytes for token in tokens)

    def tokens(self, text: bytes) -> list[int] | None:
        """Tokens of the draft with exactly these bytes: the tokenizer's, else the longest from left to right. None if there are none."""
        try:
            found = self.encode(text.decode())
        except UnicodeDecodeError:
            found = []
        return found if self.written(found) == text else self._split(text)

    def translated(self, before: bytes, tokens: Seq[int]) -> list[int] | None:
        """Tokens of the draft for bytes and tokens of the target that follow. None if there are none, or while the last character is
        incomplete."""
        text = before + b"".join(self.target[token].bytes for token in tokens)
        return None if partial(text) else self.tokens(text)

    def gram(self, token: int) -> tuple[int, ...] | None:
        """The draft's tokens for one of the target that has no partner; None if it has one, or no text."""
        if token not in self._grams:
            one, found = self.target[token], None
            if one.bytes and not one.special and one not in self.alone:
                found = self.tokens(one.bytes)
            self._grams[token] = None if found is None or len(found) < 2 else tuple(found)
        return self._grams[token]

    @cached_property
    def _grams(self) -> dict[int, tuple[int, ...] | None]:
        return {}

    def _split(self, text: bytes) -> list[int] | None:
        found, at = [], 0
        while at < len(text):
            for end in range(min(len(text), at + self._longest), at, -1):
                if (token := self._by_bytes.get(text[at:end])) is not None:
                    break
            else:
                return None
            found.append(token)
            at = end
        return found


class Grams:
    """The cache of n-grams: the draft's tokens, two or more -> the target's token. The oldest of more than `most` are dropped."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.known: dict[tuple[int, ...], int] = {}
        self.longest = 1

    def add(self, gram: tuple[int, ...], token: int) -> None:
        self.known.pop(gram, None)  # it becomes the newest
        self.known[gram] = token
        self.longest = max(self.longest, len(gram))
        if len(self.known) > self.most:
            del self.known[next(iter(self.known))]

    def translate(self, drafted: Seq[int], partners: Mapping[int, int]) -> tuple[list[int], list[int]]:
        """The target's tokens for the draft's, and the number of the draft's up to the end of each."""
        tokens: list[int] = []
        ends: list[int] = []
        at = 0
        while at < len(drafted):
            found, size = partners.get(drafted[at]), 1
            for longer in range(min(self.longest, len(drafted) - at), 1, -1):
                if (known := self.known.get(tuple(drafted[at : at + longer]))) is not None:
                    found, size = known, longer
                    break
            if found is None:
                break
            at += size
            tokens.append(found)
            ends.append(at)
        return tokens, ends


class OwnVocabulary(NamedTuple):
    size: int
    eos: frozenset[int] = frozenset()


class OwnRow(NamedTuple):
    ids: I64
    values: F64


class OwnSampler:
    """The draft model's. A request's processors mean the target's tokens, so none applies."""

    drafts, exact = Stream.DRAFT, False

    def __init__(self, size: int) -> None:
        self.vocabulary = OwnVocabulary(size)
        self._ids: I64 = np.arange(size)

    def row(self, values: F64, seq: Sequence, drafted: list[int]) -> OwnRow:
        return OwnRow(self._ids, values)

    def few(self, ids: I64, values: F64, seq: Sequence, drafted: list[int]) -> OwnRow:
        return OwnRow(ids, values)


class Translator(SecondModelDrafter):
    """The opened form. The second model's text has the same bytes as the target's, see Words."""

    def __init__(self, method: OmniDraft, runner: Any, words: Words) -> None:
        super().__init__(DraftModel(model=method.model, length=method.length, stop=method.stop), runner, OwnSampler(runner.spec.vocab))
        self.kinds = frozenset({Kind.FIXED})
        self.words, self.grams, self.length = words, Grams(method.cached), method.length

    @property
    def bytes(self) -> int:
        return ENTRY * len(self.grams.known)

    def snapshot(self) -> Any:
        return dict(self.grams.known)

    def restore(self, snapshot: Any) -> None:
        self.grams = Grams(self.grams.most)
        for gram, token in snapshot.items():
            self.grams.add(gram, token)

    # ---- the text

    def _begins(self, seq: Sequence) -> tuple[list[int], int]:
        if self.words.same:
            return super()._begins(seq)
        self._learn(seq.words)
        first = list(self.words.first)
        if seq.request.vectors is not None or (found := self.words.translated(b"", seq.tokens)) is None:
            return first, 0
        return found if first and found[: len(first)] == first else first + found, len(seq.tokens)

    def _mirror(self, seq: Sequence, tokens: Seq[int]) -> Sequence:
        mirrored = mirror(seq, tokens)
        mirrored.request = replace(mirrored.request, params=mirrored.params.but(temperature=0))
        return mirrored

    def _follow(self, state: DraftState, seq: Sequence) -> bool:
        """4."""
        if self.words.same:
            return super()._follow(state, seq)
        own = state.seq.tokens
        at = self._word(own)
        if seq.request.vectors is not None:  # no text
            return False
        if (found := self.words.translated(self.words.written(own[at:]), seq.tokens[state.read :])) is None:
            return False
        kept = at + agreeing(own[at:], found)
        if kept < state.seq.stored:
            self.memory.free(state.seq)
            state.seq.tokens = own[:at] + found
            self._open(state.seq)
        else:
            own[at:] = found
        state.read = len(seq.tokens)
        return True

    def _word(self, own: list[int]) -> int:
        """Where the last word of a text begins."""
        first = max(len(self.words.first), len(own) - AGAIN)
        for at in range(len(own) - 1, first - 1, -1):
            if self.words.draft[own[at]].bytes[:1].isspace():
                return at
        return first

    # ---- a step

    def _budget(self, budget: Budget) -> Budget:
        return Budget(self.length, self.length) if min(budget) > 0 else budget

    def _sketch(self, state: DraftState, seq: Sequence, budget: Budget) -> Sketch:
        return super()._sketch(state, state.seq, budget)

    def _offer(self, state: DraftState, budget: Budget) -> TokenTree:
        """3."""
        assert state.sketch is not None
        tokens, _ = self.grams.translate(state.sketch.tokens, self.words.partners)
        return TokenTree.chain(tokens[: min(budget)])

    def _landed(self, state: DraftState, tokens: Seq[int]) -> tuple[list[int], int]:
        assert state.sketch is not None
        offered, ends = self.grams.translate(state.sketch.tokens, self.words.partners)
        read = agreeing(offered, tokens)
        while read and ends[read - 1] > state.packed:
            read -= 1
        return list(range(ends[read - 1] if read else 0)), read

    def observe(self, result: StepResult) -> None:
        super().observe(result)
        if self.words.same:
            return
        self._learn(token for accepted in result.accepted for token in accepted.tokens)

    def _learn(self, tokens: Iterable[int]) -> None:
        """2."""
        for token in dict.fromkeys(tokens):
            if (gram := self.words.gram(token)) is not None:
                self.grams.add(gram, token)


def agreeing(one: Seq[int], other: Seq[int]) -> int:
    """The length of their common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def partial(text: bytes) -> bool:
    """Whether the end of a text is the beginning of a character."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.end == len(text) and error.reason == "unexpected end of data"
    return False
