"""The index of full pages by prefix: a radix tree with the tokens of one page on each edge. Integers only.

A node is a published page. Its keys are a function of the salt and of the tokens from the root down to it. A published page that
no lane lists is *idle*. It stays until memory is needed; the least recently listed page is evicted first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

Key = tuple[str, tuple[int, ...]]  # salt, the tokens of one page


class Miss(NamedTuple):
    """The first token that differs from cached text. at: its index; token: the token; cached: the token in the cache at this index;
    lost: how many more tokens would have been reused if the text had not differed."""

    at: int
    token: int
    cached: int
    lost: int


@dataclass(eq=False, slots=True)
class Node:
    """One published page; the root has page -1. `alive` until it is evicted. name: by which it is found on disk, empty while nobody has
    asked for it."""

    page: int
    key: Key
    parent: Node | None
    children: dict[Key, Node] = field(default_factory=dict)
    alive: bool = True
    name: bytes = b""


class PrefixTree:
    """Published pages of `page` tokens each. The table reports when a page becomes idle and when it is listed again."""

    def __init__(self, page: int) -> None:
        self.page = page
        self.root = Node(-1, ("", ()), None)
        self.nodes: dict[int, Node] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()  # longest idle first
        self.added: Callable[[Node], None] | None = None  # is called with every page that is published

    def __contains__(self, page: int) -> bool:
        return page in self.nodes

    def walk(self, tokens: Seq[int], salt: str) -> list[Node]:
        """The published pages of the longest prefix of `tokens`, at most len(tokens) - 1 tokens, because at least one must run.

        Changes nothing; it does not count as use.
        """
        at, found, size = self.root, [], self.page
        for end in range(size, len(tokens), size):
            child = at.children.get((salt, tuple(tokens[end - size : end])))
            if child is None:
                break
            found.append(child)
            at = child
        return found

    def miss(self, tokens: Seq[int], salt: str, max_pages: int = 1000) -> Miss | None:
        """Where `tokens` differ from the published text that agrees with them longest; None if no published text continues there.

        Looks at no more than `max_pages` pages after the last page that matches.
        """
        found = self.walk(tokens, salt)
        at, start = found[-1] if found else self.root, len(found) * self.page
        rest = tuple(tokens[start : start + self.page])
        best: tuple[int, Node] | None = None
        for key, child in islice(at.children.items(), max_pages):
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

    def key(self, salt: str, tokens: Seq[int]) -> Key:
        """The key of a page that is published."""
        return salt, tuple(tokens)

    def insert(self, parent: Node, salt: str, tokens: Seq[int], page: int) -> Node:
        """The child of `parent` for these tokens: the existing one, or else a new one that publishes `page`."""
        key = self.key(salt, tokens)
        child = parent.children.get(key)
        if child is None:
            child = parent.children[key] = self.nodes[page] = Node(page, key, parent)
            if self.added is not None:
                self.added(child)
        return child

    def rest(self, page: int) -> None:
        """Marks this published page as idle. A lane releases its last page first, so children become idle before their parents and
        the longest idle page is a leaf."""
        self.idle[page] = None

    def wake(self, page: int) -> None:
        """Marks this idle page as listed by a lane again."""
        del self.idle[page]

    def evict(self) -> list[int]:
        """Removes the longest idle page; returns the pages that are free now, at least one.

        The page is a leaf, unless a sequence that holds a private copy of it published its next page below. Descendants can no longer
        be found: idle ones are freed too, listed ones become private.
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
        """Raises AssertionError if the tree is inconsistent."""
        seen: dict[int, Node] = {}
        below = [self.root]
        while below:
            node = below.pop()
            for key, child in node.children.items():
                assert child.key == key and child.parent is node and child.alive, f"page {child.page} has wrong links"
                assert len(key[1]) == self.page, f"published page {child.page} is not full: {len(key[1])} tokens"
                assert child.page not in seen, f"page {child.page} is published twice"
                seen[child.page] = child
            below += node.children.values()
        assert seen == self.nodes, f"index of published pages: {sorted(self.nodes)}, in the tree: {sorted(seen)}"
        assert self.idle.keys() <= seen.keys(), f"idle but not published: {self.idle.keys() - seen.keys()}"
