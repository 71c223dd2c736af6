"""Which full pages hold which prefix: a radix tree whose edges are the tokens of one page. Integers only.

A node is a published page: its keys are a function of the salt and of the tokens from the root down to it. A page
that no lane lists is *idle*: it stays until memory is needed, and the least recently listed one goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

Key = tuple[str, tuple[int, ...]]  # salt, the tokens of one page


class Miss(NamedTuple):
    """The first token that differs from cached text: its place, itself, what stands there in the cache, and how many more tokens
    would have been reused, had it been the same from there on."""

    at: int
    token: int
    cached: int
    lost: int


@dataclass(eq=False, slots=True)
class Node:
    """One published page; the root carries page -1. `alive` until it is evicted."""

    page: int
    key: Key
    parent: Node | None
    children: dict[Key, Node] = field(default_factory=dict)
    alive: bool = True


class PrefixTree:
    """Published pages of `page` tokens each. The table says when a page becomes idle and when it is listed again."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.root = Node(-1, ("", ()), None)
        self.nodes: dict[int, Node] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()  # longest idle first

    def __contains__(self, page: int) -> bool:
        return page in self.nodes

    def walk(self, tokens: Seq[int], salt: str) -> list[Node]:
        """The published pages of the longest prefix of `tokens`, at most len(tokens) - 1 tokens: one must be left to run.

        Reads only: it does not count as use.
        """
        at, found, size = self.root, [], self.page
        for end in range(size, len(tokens), size):
            child = at.children.get((salt, tuple(tokens[end - size : end])))
            if child is None:
                break
            found.append(child)
            at = child
        return found

    def miss(self, tokens: Seq[int], salt: str, most: int = 1000) -> Miss | None:
        """Where the published text that goes on longest with `tokens` parts from it; None where nothing published goes further.

        Looks at no more than `most` pages that follow the last one which matches.
        """
        found = self.walk(tokens, salt)
        at, start = found[-1] if found else self.root, len(found) * self.page
        rest = tuple(tokens[start : start + self.page])
        best: tuple[int, Node] | None = None
        for key, child in islice(at.children.items(), most):
            if key[0] == salt and key[1] != rest:
                same = next(i for i, token in enumerate(key[1]) if i >= len(rest) or token != rest[i])
                if best is None or same > best[0]:
                    best = same, child
        if best is None or start + best[0] >= len(tokens):
            return None
        same, child = best
        depth, level = 0, [child]
        while level:
            depth, level = depth + 1, [below for node in level for below in node.children.values()]
        return Miss(start + same, tokens[start + same], child.key[1][same], depth * self.page)

    def insert(self, parent: Node, salt: str, tokens: Seq[int], page: int) -> Node:
        """The child of `parent` for these tokens: the one that is there, or `page` published as a new one."""
        key = (salt, tuple(tokens))
        child = parent.children.get(key)
        if child is None:
            child = parent.children[key] = self.nodes[page] = Node(page, key, parent)
        return child

    def rest(self, page: int) -> None:
        """No lane lists this published page any more. A lane lets go of its last page first, so that children are
        idle before their parents and the longest idle page is a leaf."""
        self.idle[page] = None

    def wake(self, page: int) -> None:
        """A lane lists this idle page."""
        del self.idle[page]

    def evict(self) -> list[int]:
        """Forgets the longest idle page; returns the idle pages that are free now, at least one.

        It is a leaf, except where a sequence holds a private copy of this page and published the next one under it.
        What hangs below can be found no more: idle pages go too, listed ones become private.
        """
        page, _ = self.idle.popitem(last=False)
        node = self.nodes[page]
        assert node.parent is not None
        del node.parent.children[node.key]
        freed, below = [page], [node]
        while below:
            node = below.pop()
            node.alive = False
            below += node.children.values()
            del self.nodes[node.page]
            if node.page in self.idle:
                del self.idle[node.page]
                freed.append(node.page)
        return freed

    def check(self) -> None:
        """AssertionError where the tree contradicts itself."""
        seen: dict[int, Node] = {}
        below = [self.root]
        while below:
            node = below.pop()
            for key, child in node.children.items():
                assert child.key == key and child.parent is node and child.alive, f"page {child.page} hangs wrongly"
                assert len(key[1]) == self.page, f"published page {child.page} is not full: {len(key[1])} tokens"
                assert child.page not in seen, f"page {child.page} is published twice"
                seen[child.page] = child
            below += node.children.values()
        assert seen == self.nodes, f"index of published pages: {sorted(self.nodes)}, in the tree: {sorted(seen)}"
        assert self.idle.keys() <= seen.keys(), f"idle but not published: {self.idle.keys() - seen.keys()}"
