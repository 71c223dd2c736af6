"""Finds all earlier places whose last tokens are those of the text, lets them vote on the next token, and drafts a tree of the votes.

Gabriele Oliaro, Zhihao Jia, Daniel Campos, Aurick Qiao: SuffixDecoding: Extreme Speculative Decoding for Emerging AI
Applications, 2024, arXiv 2411.04975.

1. A match is an earlier place, and the number of tokens before it that equal the last tokens of the text, at most LONGEST. Places
   are in the text itself, from one equal token on, and in earlier outputs of the same tenant, from START equal tokens on.
   A new token of the text extends the matches that it continues and ends the others; the longest MOST are followed.
2. The PLACES longest matches vote for their next tokens, each with the weight BASE ** length.
3. The probability of a node is its parent's, times its share of the votes, times SURE[length of the longest match].
4. The tree grows from its likeliest node: the matches that agree with a node, one token longer, vote for its children.

Differs: matches are followed token by token, so no suffix tree is built; longer matches weigh more instead of the frequencies
of one length; at most `history` tokens of outputs are kept, the oldest are dropped first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from heapq import heappop, heappush, nlargest
from itertools import count
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.plan import Budget
from redraft.core.sequence import Sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.draft.drafter import Stateless
from redraft.draft.source import Compiled, Offer
from redraft.options import Options, number

LONGEST = 20  # tokens of a match that count
START = 3  # equal tokens from which an earlier output matches
PLACES = 24  # matches that vote
MOST = 128  # matches that are followed
LATEST = 64  # the latest places of a token, or of START tokens, that are searched
BASE = 4.0
WEIGHTS = [BASE ** (length - LONGEST) for length in range(LONGEST + 1)]  # of a vote, by the length of the match
OFFERS = 4  # tokens at one place
LENGTHS = 1, 2, 3, 4, 6, 9, 15  # the shortest match of each class
SURE = 0.0, 0.35, 0.6, 0.8, 0.95  # by the length of the longest match; the last for all longer ones
TOKEN_BYTES = 300  # of memory for a token of an earlier output, its index included

OWN = 1 << 62  # the number of the text itself; earlier outputs have the numbers of their sequences


Place = tuple[int, int]
"""OWN or the number of an earlier output, and the index of the token that follows the place."""

Voters = list[tuple[int, Place]]
"""Matches: length and place, the longest first."""


class History:
    """Earlier outputs of all tenants. limit: the most tokens."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.texts: OrderedDict[int, tuple[str, list[int]]] = OrderedDict()  # number -> tenant, tokens
        self.index: dict[tuple[str, int, int, int], dict[Place, None]] = {}  # the places after START tokens, oldest first

    def put(self, number: int, tenant: str, tokens: list[int]) -> None:
        """Adds an output, or replaces what was kept of it. Only its last `limit` tokens are kept."""
        self.drop(number)
        tokens = tokens[-self.limit :] if self.limit else []
        if len(tokens) <= START:
            return
        self.texts[number] = tenant, tokens
        self.size += len(tokens)
        for key, place in self._places(number):
            self.index.setdefault(key, {})[place] = None
        while self.size > self.limit:
            self.drop(next(iter(self.texts)))

    def drop(self, number: int) -> None:
        if number not in self.texts:
            return
        for key, place in self._places(number):
            places = self.index[key]
            del places[place]
            if not places:
                del self.index[key]
        self.size -= len(self.texts.pop(number)[1])

    def find(self, tenant: str, tokens: Seq[int]) -> list[Place]:
        """The latest places after these START tokens."""
        places = self.index.get((tenant, *tokens))  # type: ignore[arg-type]
        return list(places)[-LATEST:] if places else []

    def _places(self, number: int) -> list[tuple[tuple[str, int, int, int], Place]]:
        tenant, tokens = self.texts[number]
        grams = zip(tokens, tokens[1:], tokens[2:], strict=False)
        return [((tenant, *gram), (number, i)) for i, gram in enumerate(grams, START) if i < len(tokens)]


@dataclass
class Matches:
    """The matches of one text. places, pairs: the places after a token and after two, in the text, oldest first; found: place -> length
    of the match, of two tokens or more; seen: the tokens that were read."""

    seq: Sequence
    history: History
    places: dict[int, list[int]] = field(default_factory=dict)
    pairs: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    found: dict[Place, int] = field(default_factory=dict)
    seen: int = 0

    def catch_up(self) -> None:
        """Reads the new tokens of the text."""
        tokens = self.seq.tokens
        for i in range(self.seen, len(tokens)):
            pair = (tokens[i - 1], tokens[i]) if i else (-1, tokens[i])
            own = self.pairs.setdefault(pair, [])
            if i >= len(tokens) - LONGEST:  # earlier ones are too far back to be in a match
                self._read(tokens, i, own)
            own.append(i + 1)
            self.places.setdefault(tokens[i], []).append(i + 1)
        self.seen = len(tokens)

    def _read(self, tokens: list[int], i: int, own: list[int]) -> None:  # 1.
        token, found = tokens[i], {}
        for (source, at), length in self.found.items():
            text = tokens if source == OWN else self.text(source)
            if at < len(text) and text[at] == token:
                found[source, at + 1] = length + 1 if length < LONGEST else LONGEST
        for at in own[-LATEST:]:
            found.setdefault((OWN, at), 2)
        if i + 1 >= START and self.history.texts:
            for place in self.history.find(self.seq.request.salt, tokens[i + 1 - START : i + 1]):
                found.setdefault(place, START)
        if len(found) > MOST:
            found = {place: length for length, place in nlargest(MOST, ((length, place) for place, length in found.items()))}
        self.found = found

    def text(self, number: int) -> Seq[int]:
        """The tokens of a text; none if it was dropped."""
        if number == OWN:
            return self.seq.tokens
        kept = self.history.texts.get(number)
        return kept[1] if kept else ()

    def voters(self) -> Voters:
        """The longest matches, the longest first. Matches of one token are not kept in `found`, the latest ones are looked up here."""
        found = nlargest(PLACES, ((length, place) for place, length in self.found.items()))
        if len(found) < PLACES:
            longer, last = self.found, len(self.seq.tokens)
            for at in reversed(self.places[self.seq.tokens[-1]][-2 * PLACES :]):
                if at < last and (OWN, at) not in longer and len(found) < PLACES:
                    found.append((1, (OWN, at)))
        return found

    def groups(self, voters: Voters) -> dict[int, tuple[float, Voters]]:  # 2.
        """token -> the sum of its votes, and its voters one token further."""
        groups: dict[int, tuple[float, Voters]] = {}
        own = self.seq.tokens
        for length, (source, at) in voters:
            text = own if source == OWN else self.text(source)
            if at < len(text):
                token, step = text[at], (length + 1 if length < LONGEST else LONGEST, (source, at + 1))
                if token in groups:
                    weight, group = groups[token]
                    group.append(step)
                    groups[token] = weight + WEIGHTS[length], group
                else:
                    groups[token] = WEIGHTS[length], [step]
        return groups

    def tree(self, budget: Budget) -> TokenTree:
        """The likeliest nodes, at most those of the budget."""
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[float] = []
        heap: list[tuple[float, int, int, int, int, Voters]] = []
        order = count()

        def vote(parent: int, depth: int, score: float, voters: Voters) -> None:
            groups = self.groups(voters)
            if not groups:
                return
            score *= SURE[min(voters[0][0], len(SURE) - 1)] / sum(weight for weight, _ in groups.values())  # 3.
            for token, (weight, group) in groups.items():
                heappush(heap, (-score * weight, next(order), parent, token, depth, group))

        vote(-1, 1, 1.0, self.voters())
        while heap and len(tokens) < budget.rows:  # 4.
            score, _, parent, token, depth, group = heappop(heap)
            tokens.append(token)
            parents.append(parent)
            scores.append(-score)
            if depth < budget.depth:
                vote(len(tokens) - 1, depth + 1, -score, group)
        if not tokens:
            return EMPTY
        kinds = np.zeros(len(tokens) + 1, np.uint8)
        return TokenTree(np.array(tokens, np.int32), np.array(parents, np.int32), kinds, scores=np.array(scores, np.float32))


@dataclass(frozen=True)
class Suffix(Options):
    """history: the tokens of earlier outputs that are kept, of all tenants together; 0: only the text itself is searched."""

    history: int = number(65536, ge=0, le=1 << 20)

    card: ClassVar[Card] = Card(
        "Suffix vote",
        "Oliaro, Jia, Campos, Qiao, SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications, 2024, arXiv 2411.04975",
        Guarantee.SAME_TEXT,
        deviates="longer matches weigh more instead of frequencies of one length; no suffix tree; the oldest outputs are dropped",
        summary="All earlier matches vote; code, edits, repeated work",
    )

    def max_bytes(self, runner: Any) -> int:
        return TOKEN_BYTES * self.history

    def open(self, runner: Any, sampler: Any) -> Voter:
        return Voter(self.history)


class Voter(Stateless):
    """The opened drafter. All requests of a tenant (`Request.salt`) share its earlier outputs."""

    buckets = len(LENGTHS) * 4 * 2  # length of the longest match, share of the votes, whether the longest match is among the voters

    def __init__(self, history: int) -> None:
        self.history = History(history)

    @property
    def bytes(self) -> int:
        return TOKEN_BYTES * self.history.size

    def begin(self, seq: Sequence) -> Matches:
        return Matches(seq, self.history)

    def end(self, state: Matches) -> None:
        seq = state.seq
        start = max(0, seq.prompt_len - START + 1)  # so that the first new token is found after START - 1 tokens of the prompt
        self.history.put(seq.id, seq.request.salt, seq.tokens[start:])

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        return [self._vote(seq.state[self], budget) if min(budget) > 0 else EMPTY for seq, budget in zip(seqs, budgets, strict=True)]

    def _vote(self, matches: Matches, budget: Budget) -> TokenTree:
        matches.catch_up()
        return matches.tree(budget)

    # ---- offers of single tokens; a place is (matches, voters, their groups)

    def start(self, seq: Sequence) -> Any:
        matches: Matches = seq.state[self]
        matches.catch_up()
        voters = matches.voters()
        return (matches, voters, matches.groups(voters)) if voters else None

    def follow(self, place: Any, token: int) -> Any:
        matches, _, groups = place
        if token not in groups:
            return None
        voters = groups[token][1]
        return matches, voters, matches.groups(voters)

    def offers(self, place: Any) -> list[Offer]:
        _, voters, groups = place
        if not groups:
            return []
        longest = voters[0][0]
        base = 8 * bisect_right(LENGTHS, longest) - 8
        if len(groups) == 1:
            return [(token, base + 7) for token in groups]
        total = sum(weight for weight, _ in groups.values())
        grown = longest + 1 if longest < LONGEST else LONGEST
        best = sorted(groups.items(), key=lambda item: -item[1][0])[:OFFERS]
        return [
            (token, base + 2 * ((weight > 0.2 * total) + (weight > 0.5 * total) + (weight > 0.9 * total)) + (group[0][0] == grown))
            for token, (weight, group) in best
        ]

    def compiled(self, library: Any) -> Compiled:
        return Compiled.new(library, "rd_suffix", self.history.limit, unit=TOKEN_BYTES)

    def snapshot(self) -> list[tuple[int, str, list[int]]]:
        return [(number, tenant, list(tokens)) for number, (tenant, tokens) in self.history.texts.items()]

    def restore(self, snapshot: list[tuple[int, str, list[int]]]) -> None:
        self.history = History(self.history.limit)
        for name, tenant, tokens in snapshot:
            self.history.put(name, tenant, tokens)
