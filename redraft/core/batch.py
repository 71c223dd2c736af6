"""The packed rows of one step: the only input of a forward pass besides taps."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from redraft.core.layers import Between, Layers
from redraft.core.plan import Work
from redraft.core.sequence import PLAIN, Lanes, Sequence, Space
from redraft.core.tree import EMPTY, F32, I32, I64, U64, TokenTree
from redraft.core.view import View


class StateView(NamedTuple):
    """The slots from which the rows of each sequence read a state of fixed size, and to which they write it. Rows run in order. Row r
    of sequence s computes its state from the one in slot reads[s][r] and writes it to slot writes[s][r]. Both are i32[rows]."""

    reads: list[I32]
    writes: list[I32]

    def only(self, chosen: Seq[int]) -> StateView:
        return StateView([self.reads[s] for s in chosen], [self.writes[s] for s in chosen])


@dataclass(frozen=True)
class PageView:
    """Where the keys of each sequence are stored. Row r of sequence s has slot lengths[s][lane] + tail[s] + r in every lane.

    kinds[s]: the lane kind; pages[s]: i32[lanes, n], page ids in slot order (numbered within the sequence's space; see PageTable);
    lengths[s]: i32[lanes], committed slots; tail[s]: tentative rows that an earlier forward of the same tail wrote; chain[s]: chain
    rows of the whole tail, so node j has slot lengths + chain + j; fresh: pages that this reserve allocated and that must be zeroed;
    positions[s]: None while slot i holds position i, else one i32[length] for each lane; encoded[s]: i32[lanes, m], pages that hold the
    first 32 m slots of a lane in the sequence's format of encoded pages, before pages[s]; logs[s]: the logarithms of the numbers
    of tokens that slots stand for, f32[length] for each lane, None while all are 0; slots[s]: i32[rows], ascending, the committed slots
    that rows write again, each of which then sees the slots up to its own; None for rows after the tail; states: one entry for each
    memory of fixed size.
    """

    kinds: list[Lanes]
    pages: list[I32]
    lengths: list[I32]
    tail: list[int]
    chain: list[int]
    fresh: list[tuple[Space, int]]
    positions: list[list[I32] | None]
    encoded: list[I32]
    logs: list[list[F32] | None]
    slots: list[I32 | None]
    states: tuple[StateView, ...] = ()

    def tentative(self, s: int, rows: int) -> int:
        """Tentative slots of sequence s, of which `rows` rows run."""
        return self.tail[s] + rows if self.slots[s] is None else 0

    def held(self, s: int, rows: int) -> int:
        """The same with the committed slots of its longest lane."""
        return int(self.lengths[s].max()) + self.tentative(s, rows)

    def only(self, chosen: Seq[int]) -> PageView:
        """The view of the chosen sequences; `fresh` is empty."""
        return PageView(
            [self.kinds[s] for s in chosen],
            [self.pages[s] for s in chosen],
            [self.lengths[s] for s in chosen],
            [self.tail[s] for s in chosen],
            [self.chain[s] for s in chosen],
            [],
            [self.positions[s] for s in chosen],
            [self.encoded[s] for s in chosen],
            [self.logs[s] for s in chosen],
            [self.slots[s] for s in chosen],
            tuple(state.only(chosen) for state in self.states),
        )


@dataclass(frozen=True)
class Batch:
    """T packed rows of S sequences. Rows of sequence s before tree_starts[s] are the causal chain; rows from there on are tree nodes.

    tokens, positions: i32[T]; starts: i32[S + 1]; tree_starts: i32[S]; visible: u64[tree rows, W], bit j: the row sees tentative
    node j of its sequence, itself included (a chain row has no bits: it sees the chain up to itself); tails[s]: i32[tail + rows],
    positions of the tentative slots, those of earlier forwards of the same tail first; logit_rows: i32[R], the rows that need
    logits; roots: i32[S], the logit row of the last pending token of each sequence, -1 where the chunk ends earlier or an earlier
    forward of the same tail ran that token. Node i of sequence s has logit row roots[s] + 1 + i. views[s]: which slots the rows
    see, None for all; layers[s]: the layers that the rows run, None for all; adapters[s]: what changes the weights for the rows, None
    for nothing (models/adapter.py); between[s]: what changes hidden states between layers, None for nothing; vectors: i64[n], rows that
    start from a vector instead of their token's embedding, ascending, and these vectors [n, hidden].

    Positions and visibility are both given; neither is derived from the other. A row sees all committed slots, the chain and the
    nodes of its bits, except what its view and the window of its layer hide by position.

    Example: a chunk of 3 tokens of a longer prompt, a chain that draws a token, and a tree of two branches under one pending token:

        sequence        s0: chunk      s1: decode   s2: decode + tree
        row             0   1   2      3            4    5    6    7
        token           11  12  13     21           31   40   41   50
        position        0   1   2      9            5    6    6    7     (root 5; 40 and 41 are siblings, 50 follows 40)
        visible         .   .   .      .            .    001  010  101   (only the tree rows carry bits)
        tail            0   1   2      9            5    6    6    7     (positions, as this is the first forward)
        logit row       .   .   .      0            1    2    3    4

    >>> from redraft.core.testing import work, view
    >>> ws = [work([11, 12, 13, 14], rows=3), work(range(12, 22), stored=9), work(range(26, 32), stored=5)]
    >>> tree = TokenTree.build([40, 41, 50], [-1, -1, 0], vocab=99, rows=8, depth=8)
    >>> empty = TokenTree.chain([])
    >>> b = Batch.pack(ws, [empty, empty, tree], view(ws))
    >>> b.tokens.tolist()
    [11, 12, 13, 21, 31, 40, 41, 50]
    >>> b.positions.tolist()
    [0, 1, 2, 9, 5, 6, 6, 7]
    >>> b.starts.tolist(), b.tree_starts.tolist()
    ([0, 3, 4, 8], [3, 4, 5])
    >>> b.visible.ravel().tolist(), b.logit_rows.tolist(), b.roots.tolist()
    ([1, 2, 5], [3, 4, 5, 6, 7], [-1, 0, 1])
    >>> [tail.tolist() for tail in b.tails]
    [[0, 1, 2], [9], [5, 6, 6, 7]]
    """

    tokens: I32
    positions: I32
    starts: I32
    tree_starts: I32
    visible: U64
    tails: list[I32]
    pages: PageView
    logit_rows: I32
    roots: I32
    views: list[View | None]
    layers: list[Layers | None]
    adapters: list[Any]
    between: list[Between | None]
    vectors: tuple[I64, Any] | None = None

    @classmethod
    def pack(cls, work: Seq[Work], trees: Seq[TokenTree], pages: PageView) -> Batch:
        """Packs the pending chain and then the draft of every sequence. Rows that draw a token and all nodes need logits; so do rows
        of the prompt when the request wants prompt_logprobs."""
        tokens: list[int] = []
        positions: list[int] = []
        starts, tree_starts = [0], []
        logit_rows: list[int] = []
        roots: list[int] = []
        bits: list[U64] = []
        words = max((t.ancestors().shape[1] for t in trees if t is not EMPTY), default=0)
        for w, tree, tail in zip(work, trees, pages.tail, strict=True):
            seq = w.seq
            rows = 0 if tail else w.rows  # only the first forward of a tail packs the chain
            again = range(seq.stored, seq.stored + rows) if w.rerun is None else w.rerun.slots.tolist()
            tokens += [seq.tokens[i] for i in again]
            positions += again
            root = seq.stored + w.rows - 1
            tree_starts.append(len(tokens))
            if len(tree) > w.first:
                tokens += tree.tokens[w.first :].tolist()
                positions += [root + depth for depth in tree.depths()[w.first :].tolist()]
                own = tree.ancestors()[w.first :]
                bits.append(own if own.shape[1] == words else np.pad(own, ((0, 0), (0, words - own.shape[1]))))
            starts.append(len(tokens))
            last = tree_starts[-1] - 1
            asked = [starts[-2] + row for row in w.prompt_rows] if rows else []
            if w.done:
                logit_rows += asked[:-1] if asked and asked[-1] == last else asked
                roots.append(len(logit_rows) if rows else -1)
                logit_rows += range(last if rows else tree_starts[-1], len(tokens))
            else:
                roots.append(-1)
                logit_rows += asked
        lists = tokens, positions, starts, tree_starts, logit_rows, roots
        whole = np.array([*chain.from_iterable(lists)], np.int32)  # one array, because each conversion of a list takes long
        ends = accumulate(map(len, lists), initial=0)
        ids, where, begins, tree_begins, wanted, root_rows = (whole[a:z] for a, z in pairwise(ends))
        spans = list(pairwise(starts))
        return cls(
            ids,
            where,
            begins,
            tree_begins,
            np.concatenate(bits) if bits else np.zeros((0, max(words, 1)), np.uint64),
            [
                _tail(w, tree) if tail else where[a : a if w.rerun else z]
                for w, tree, tail, (a, z) in zip(work, trees, pages.tail, spans, strict=True)
            ],
            pages,
            wanted,
            root_rows,
            [_view(w.seq, positions[a:z]) for w, (a, z) in zip(work, spans, strict=True)],
            [w.seq.layers if w.rerun is None else w.rerun.layers for w in work],
            [w.seq.request.adapter for w in work],
            [w.seq.between for w in work],
            _vectors(work, trees, pages.tail, starts, tree_starts),
        )

    @property
    def plain(self) -> bool:
        """Whether every row sees all slots before it, in shared lanes from which nothing was evicted, and runs all layers, with nothing
        between them."""
        count, pages = len(self.views), self.pages
        absent = self.views, self.layers, self.between, pages.positions
        nothing = all(one.count(None) == count for one in absent) and all(one is None for one in pages.slots)
        return nothing and pages.kinds.count(Lanes.SHARED) == count

    def only(self, chosen: Seq[int]) -> tuple[Batch, I32]:
        """A batch of the chosen sequences without logit rows and vectors, and i32[rows]: the rows of this batch that it holds."""
        spans = [range(int(self.starts[s]), int(self.starts[s + 1])) for s in chosen]
        rows = np.fromiter((row for span in spans for row in span), np.int32)
        chains = [int(self.tree_starts[s] - self.starts[s]) for s in chosen]
        starts = np.cumsum([0, *map(len, spans)])
        nodes = self.starts[1:] - self.tree_starts
        first = np.cumsum(np.concatenate([[0], nodes]))
        bits = [self.visible[first[s] : first[s] + nodes[s]] for s in chosen]
        none = np.zeros(0, np.int32)
        return (
            Batch(
                self.tokens[rows],
                self.positions[rows],
                starts.astype(np.int32),
                (starts[:-1] + chains).astype(np.int32),
                np.concatenate(bits) if bits else self.visible[:0],
                [self.tails[s] for s in chosen],
                self.pages.only(chosen),
                none,
                np.full(len(chosen), -1, np.int32),
                [self.views[s] for s in chosen],
                [self.layers[s] for s in chosen],
                [self.adapters[s] for s in chosen],
                [self.between[s] for s in chosen],
            ),
            rows,
        )


def _tail(w: Work, tree: TokenTree) -> I32:
    """Positions of all tentative slots, in slots of earlier forwards too."""
    root = w.seq.stored + w.rows - 1
    return np.concatenate([np.arange(w.seq.stored, root + 1), tree.depths() + root]).astype(np.int32)


def _vectors(work: Seq[Work], trees: Seq[TokenTree], tails: Seq[int], starts: Seq[int], tree_starts: Seq[int]) -> tuple[I64, Any] | None:
    """The rows of prompts that requests gave as vectors, and of nodes that start from vectors."""
    found = []
    for w, tree, tail, start, tree_start in zip(work, trees, tails, starts, tree_starts, strict=False):
        given = w.seq.request.vectors
        if given is not None and not tail and len(own := given[w.seq.stored : w.seq.stored + w.rows]):
            places = np.flatnonzero(~np.isnan(own[:, 0]))
            found.append((places + start, own[places]))
        if tree.vectors is not None and (skipped := max(0, w.first - tree.drafts)) < len(tree.vectors):
            nodes = np.arange(tree.drafts + skipped, len(tree))
            found.append((nodes - w.first + tree_start, tree.vectors[skipped:]))
    if not found:
        return None
    rows, vectors = zip(*found, strict=True)
    return np.concatenate(rows), np.concatenate(vectors)


def _view(seq: Sequence, positions: list[int]) -> View | None:
    """The view of rows at these positions, None where they see all slots. No step mixes rows before and after the start of a sparse
    read. A window or a sparse read that hides nothing from the deepest row is left out, and so is a distance if that row has no far
    key, and groups of keys that no row attends as such."""
    chosen = seq.cache
    if chosen is PLAIN:
        return None
    deepest = max(positions, default=0)
    read, far = chosen.read, None if chosen.read is None else chosen.read.far
    far = far if far is not None and deepest >= far.near else None
    if read is not None and (seq.stored < seq.reads_from or deepest + 1 <= read.dense_up_to):
        read = None
    read = None if read is None else seq.state.get(read, read)  # the text's own state selects
    window = chosen.window if chosen.window is not None and deepest + 1 > chosen.window.size else None
    parallel = seq.parallel if seq.parallel is not None and not seq.parallel.neutral and deepest >= seq.parallel.end else None
    view = View(chosen.format, chosen.encoded, window, read, far, parallel)
    return view if any(view) else None
