"""Which spans of tokens are in the prefix cache, wherever they stand in their texts.

Texts are cut where their last few tokens say so, so that equal spans of two texts have equal cuts, whatever stands before them:
Muthitacharoen, Chen, Mazieres, A Low-bandwidth Network File System, 2001. Integers only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from redraft.kv.prefix import Node, PrefixTree

LEAST, AVERAGE, MOST = 16, 64, 256  # tokens of a span
ENTRIES = 1 << 16
NEAR = 10  # pages in which a span ends after the one before it has, at most
CHILDREN = 64  # pages after a page that are compared with a text, at most
BITS = (1 << 64) - 1
FACTOR = 0x9E3779B97F4A7C15  # odd; its bits look random
POWERS = [np.uint64(pow(FACTOR, i, BITS + 1)) for i in range(1, 9)]  # of the last tokens before a cut, which decide about it
CUT = np.uint64(BITS // (AVERAGE - LEAST))  # a hash below this is a cut


class Found(NamedTuple):
    """`length` tokens from position `at` on equal those of the published text `source` from `first` on."""

    at: int
    first: int
    length: int
    source: list[int]


def cuts(tokens: Seq[int]) -> list[int]:
    """The ends of the spans of a text, ascending, without that of the unfinished one at its end.

    >>> text = np.random.default_rng(1).integers(0, 999, 400).tolist()
    >>> cuts(text)
    [46, 108, 149, 225, 252, 380]
    >>> cuts(text[60:])  # the same ones, 60 tokens earlier
    [48, 89, 165, 192, 320]
    """
    values = np.asarray(tokens, np.uint64) + np.uint64(1)
    hashes, count = np.zeros(len(values), np.uint64), len(values)
    for back, power in enumerate(POWERS[:count]):
        hashes[back:] += values[: count - back] * power
    hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(FACTOR)
    ends = np.flatnonzero(hashes ^ (hashes >> np.uint64(32)) < CUT) + 1
    found, at = [], 0
    for end in [*ends.tolist(), count + MOST]:
        while end - at > MOST and at + MOST <= count:
            at += MOST
            found.append(at)
        if end - at >= LEAST and end <= count:
            at = end
            found.append(at)
    return found


class SpanIndex:
    """The spans of the published texts of a tree, those published last first. There is one for a tree, from its first use on."""

    def __init__(self, tree: PrefixTree, entries: int = ENTRIES) -> None:
        self.tree, self.entries = tree, entries
        self._spans: OrderedDict[tuple[str, bytes], tuple[Node, int]] = OrderedDict()  # salt and tokens -> (page of the last one, first)
        self._open: dict[int, tuple[Node, int, int]] = {}  # page -> (its node, where the unfinished span at its end begins, that end)
        below = [*tree.root.children.values()]
        while below:
            self.add(below[-1])
            below += below.pop().children.values()
        tree.added = self.add

    @classmethod
    def of(cls, tree: PrefixTree) -> SpanIndex:
        own = getattr(tree.added, "__self__", None)
        return own if isinstance(own, SpanIndex) else cls(tree)

    def __len__(self) -> int:
        return len(self._spans)

    def add(self, node: Node) -> None:
        """Enters the spans that end in a page. The pages above it were entered before."""
        parent, size = node.parent, self.tree.page
        assert parent is not None
        own, at, count = self._open.get(parent.page, (None, 0, 0))
        if own is not parent:  # it is the root
            at = count = 0
        count += size
        pages = path(node, (count - at // size * size) // size)
        tokens = [token for one in pages for token in one.key[1]][at % size :]
        ends = [0, *cuts(tokens)]
        for start, end in pairwise(ends):
            key = _key(node.key[0], tokens[start:end])
            self._spans[key] = node, at + start
            self._spans.move_to_end(key)
        while len(self._spans) > self.entries:
            self._spans.popitem(last=False)
        self._open[node.page] = node, at + ends[-1], count

    def find(self, tokens: Seq[int], salt: str, stored: int = 0) -> list[Found]:
        """The spans of a text that are published, in order and without overlap, before its last token. `stored` tokens of it and of what
        follows it, whole pages, are known to be published. Spans that follow one another in a published text too are one, and equal tokens
        around them are part of them."""
        salt, before = self.tree.key(salt, ())[0], 0
        runs: list[tuple[int, int, int, Node]] = []  # first and end in the text, to the place in the published one, its last page
        if stored >= len(tokens) - 1:
            return []
        if stored:
            runs.append((stored, stored, 0, self.tree.walk(tokens, salt)[stored // self.tree.page - 1]))
        for end in cuts(tokens):
            at, before = before, end
            if end <= stored or (hit := self._alive(_key(salt, tokens[at:end]))) is None:
                continue
            node, first = hit
            if runs and runs[-1][1] == at and runs[-1][2] == first - at and runs[-1][3] in path(node, NEAR):
                runs[-1] = (runs[-1][0], end, first - at, node)
            else:
                runs.append((at, end, first - at, node))
        runs = [(at, end, shift, self._further(node, tokens, shift, salt)) for at, end, shift, node in runs]
        paths = {id(run[3]): path(run[3]) for run in runs}
        found: list[Found] = []
        texts: dict[int, list[int]] = {}
        for at, end, shift, node in runs:
            whole = max((other for other in paths.values() if node in other), key=len)  # one source for all spans of a text
            source = texts.setdefault(id(whole[-1]), [token for one in whole for token in one.key[1]])
            least, most = (found[-1].at + found[-1].length if found else stored), min(len(tokens) - 1, len(source) - shift)
            at, end = max(at, least), min(end, most)
            while at > max(least, -shift) and tokens[at - 1] == source[at - 1 + shift]:
                at -= 1
            while end < most and tokens[end] == source[end + shift]:
                end += 1
            if end > at:
                found.append(Found(at, at + shift, end - at, source))
        return found

    def _further(self, node: Node, tokens: Seq[int], shift: int, salt: str) -> Node:
        """The page below which agrees with a text longest, of those that follow tokens[i] at i + shift."""
        at, size = len(path(node)) * self.tree.page - shift, self.tree.page
        while len(rest := tuple(tokens[at : at + size])) == size and (child := node.children.get((salt, rest))) is not None:
            node, at = child, at + size
        some = [child for key, child in islice(node.children.items(), CHILDREN) if key[0] == salt]
        return max(some, key=lambda child: _same(child.key[1], rest), default=node)

    def _alive(self, key: tuple[str, bytes]) -> tuple[Node, int] | None:
        """The entry of a span, unless its pages left the cache: then it is dropped."""
        found = self._spans.get(key)
        if found is not None and not found[0].alive:
            del self._spans[key]
            return None
        return found


def _key(salt: str, tokens: Seq[int]) -> tuple[str, bytes]:
    return salt, np.asarray(tokens, np.int32).tobytes()


def _same(a: Seq[int], b: Seq[int]) -> int:
    """How many leading tokens agree."""
    return next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def path(node: Node, most: int = 1 << 30) -> list[Node]:
    """The pages of a published text, from its first to this one; the last `most` of them."""
    found = [node]
    while len(found) < most and (above := found[-1].parent) is not None and above.parent is not None:
        found.append(above)
    return found[::-1]
