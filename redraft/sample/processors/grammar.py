"""A grammar that the whole text must follow: tokens that cannot continue it are dropped, drafts that break it are pruned, and tokens
that it forces are drafted."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from redraft.config import Grammar, SamplingParams
from redraft.core.plan import Budget
from redraft.core.sequence import Sequence
from redraft.core.tree import TokenTree
from redraft.errors import InvalidInput, RedraftError
from redraft.sample.grammars.compiler import Compiler, first_line
from redraft.sample.processors.processor import Constraint, Ending, Row, Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

MASKS = ThreadPoolExecutor(1, "redraft-mask")
LEAVES = 4  # of a draft, after which forced tokens are looked for
LEXER = "lexer error"  # in what the library says of a lexer that is full
WORD = 32  # bytes of a token, of which few have more

Path = tuple[int, ...]  # of drafted tokens


class FollowGrammar(Constraint, Ending):
    """matcher: the state of the text in the grammar. It moves to the row that is asked about: back to the tokens that both paths share,
    then on. The first `_base` new tokens are committed for good, `_beyond` are the tokens after them. `_mask`: the allowed tokens of the
    state, computed in another thread, while the model runs."""

    name = "grammar"

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary) -> None:
        self.grammar, self.compiler = grammar, vocabulary.shared(Compiler)
        self.matcher = self.compiler.start(grammar)
        assert vocabulary.plain is not None
        self.plain = vocabulary.plain
        self._base, self._beyond = 0, list[int]()
        self._mask: Future[bytes] | None = None
        self._renewed = -1  # new tokens when the matcher was renewed

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        grammar: Grammar | None = params.structured_outputs
        if grammar is None:
            return None
        if params.min_tokens:
            raise InvalidInput(f"min_tokens = {params.min_tokens}: not with structured_outputs, which decide where the text ends")
        return cls(grammar, vocabulary)

    def apply(self, row: Row) -> None:
        if not self._at(row.seq, row.drafted):
            return  # after a draft that breaks the grammar: no verifier accepts it, so nothing is drawn here
        bits = np.unpackbits(self._allowed(row.seq, row.drafted), bitorder="little").view(bool)
        row.keep(np.flatnonzero(bits[: len(row.ids)] if row.ids[-1] + 1 == len(row.ids) else bits[row.ids]))

    def prepare(self, seq: Sequence) -> None:
        if not seq.params.greedy and self._at(seq, ()):  # a greedy request asks about its likeliest token alone
            self._mask = MASKS.submit(self.matcher.compute_bitmask)

    def allows(self, seq: Sequence, drafted: Seq[int], token: int) -> bool:
        """As `apply`, which does not allow every token that fits: where the grammar forces bytes, only as the tokenizer spells them."""
        if not self._at(seq, drafted) or self._settled().validate_tokens([token]) != 1:
            return False
        forced = self.matcher.compute_ff_bytes() or self.matcher.is_error()
        return not forced or bool(self._allowed(seq, drafted)[token // 8] >> token % 8 & 1)

    def finished(self, seq: Sequence, tokens: Seq[int]) -> bool:
        return self._at(seq, tokens) and self._settled().is_stopped()

    def fit(self, seq: Sequence, tree: TokenTree, budget: Budget, origin: int) -> TokenTree:
        if any(tree.kinds.tolist()):
            return tree  # its verifier needs every draw, and its drafter sampled with the grammar
        found: dict[Path, tuple[int, float]] = {}  # path -> (origin, score)
        self._force(seq, (), 1.0, found, origin, budget.depth)
        kept = self._kept(seq, tree.without_vectors())
        for path, source in kept.items():
            found.setdefault(path, source)
        inner = {path[:-1] for path in found}
        for leaf in [path for path in found if path not in inner][:LEAVES]:
            self._force(seq, leaf, found[leaf][1], found, origin, budget.depth)
        if len(kept) == len(found) == tree.drafts:
            return tree
        return _tree(found, budget, scored=tree.scores is not None)

    def _kept(self, seq: Sequence, tree: TokenTree) -> dict[Path, tuple[int, float]]:
        """The nodes that the grammar allows."""
        paths: dict[int, Path] = {-1: ()}
        kept: dict[Path, tuple[int, float]] = {}
        origins = [0] * len(tree) if tree.origins is None else tree.origins.tolist()
        scores = [1.0] * len(tree) if tree.scores is None else tree.scores.tolist()
        for node, (token, parent) in enumerate(zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True)):
            if parent in paths and self.allows(seq, paths[parent], token):
                paths[node] = (*paths[parent], token)
                kept[paths[node]] = origins[node], scores[node]
        return kept

    def _force(self, seq: Sequence, path: Path, score: float, found: dict[Path, tuple[int, float]], origin: int, most: int) -> None:
        """Adds the tokens, `most` of them, that the grammar forces after a path. The bytes that it forces may be more: their last token may
        also be spelled together with what follows, so it is likely, not certain."""
        if not self._at(seq, path):
            return
        sure = tuple(self._settled().compute_ff_tokens()[:most])
        rest = self.matcher.compute_ff_bytes() if len(sure) < most and self._at(seq, path + sure) else b""
        likely = self.plain(rest[: WORD * most].decode(errors="ignore")) if rest else []
        for token in (*sure, *likely[: self.matcher.validate_tokens(likely)])[:most]:
            path = (*path, token)
            found.setdefault(path, (origin, score))

    def _allowed(self, seq: Sequence, drafted: Seq[int]) -> NDArray[np.uint8]:
        """One bit for each token."""
        mask = self.matcher.compute_bitmask() if self._mask is None else self._mask.result()
        if self.matcher.is_error():
            self._renew(seq)
            self._at(seq, drafted)
            return self._allowed(seq, drafted)
        return np.frombuffer(mask, np.uint8)

    def _at(self, seq: Sequence, drafted: Seq[int]) -> bool:
        """Moves to the state after seq.tokens and `drafted`. Returns whether the grammar allows this path."""
        if self._settled().is_error():
            self._renew(seq)
        path = [*seq.tokens[seq.prompt_len + self._base :], *drafted]
        if path == self._beyond and seq.generated == self._base:
            return True
        matcher, same = self.matcher, 0
        self._mask = None
        for old, new in zip(self._beyond, path, strict=False):
            if old != new:
                break
            same += 1
        if same < len(self._beyond):
            matcher.rollback(len(self._beyond) - same)
        done = same + matcher.try_consume_tokens(path[same:])
        if matcher.is_error():
            self._renew(seq)
            return self._at(seq, drafted)
        committed = seq.generated - self._base
        assert done >= committed, "a token that breaks the grammar was committed"
        self._base, self._beyond = seq.generated, path[committed:done]
        return done == len(path)

    def _settled(self) -> LLMatcher:
        """The matcher when no other thread uses it."""
        if self._mask is not None:
            self._mask.result()
        return self.matcher

    def _renew(self, seq: Sequence) -> None:
        """After an error: starts again with a lexer of its own, in case that it was full. RedraftError if that does not help."""
        error = self.matcher.get_error()
        if LEXER not in error or self._renewed == seq.generated:
            raise RedraftError(f"structured_outputs: the grammar cannot be followed further: {first_line(error)}")
        self.matcher, self._renewed = self.compiler.start(self.grammar, anew=True), seq.generated
        self._base, self._beyond, self._mask = 0, [], None


def _tree(found: dict[Path, tuple[int, float]], budget: Budget, *, scored: bool) -> TokenTree:
    """The first paths that fit into the budget. Every path comes after those that it extends."""
    paths = [path for path in found if len(path) <= budget.depth][: budget.rows]
    place = {(): -1} | {path: node for node, path in enumerate(paths)}
    return TokenTree(
        np.array([path[-1] for path in paths], np.int32),
        np.array([place[path[:-1]] for path in paths], np.int32),
        np.zeros(len(paths) + 1, np.uint8),
        origins=np.array([found[path][0] for path in paths], np.uint16),
        scores=np.array([found[path][1] for path in paths], np.float32) if scored else None,
    )
