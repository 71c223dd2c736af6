"""Offline batches in the order of their shared prefixes: those who share one run together, and it is computed once.

Zhen Zheng, Xin Ji, Taosong Fang, Fanghao Zhou, Chuanjie Liu, Gang Peng, BatchLLM: Optimizing Large Batched LLM Inference with Global Prefix
Sharing and Throughput-oriented Token Batching, 2024, arXiv 2412.03594.

1. The prompts of a batch form a tree of their pages.
2. Each prompt shares at most one prefix. From the leaves up, a node decides which of its children share its own prefix and which share
   longer ones below: best(u) = max(sum best(c), sum max(best(c), n(c) len(u)) - len(u)), where n counts the prompts below a node.
3. Groups run by their expected new tokens for each token of their prompts, the most first, so that texts decode beside later prompts.
4. The first text of a group computes the prefix, and the others wait for it. The engine holds it until the last of them has ended.
5. A text is admitted while its pages and those that all running texts are expected to need fit into the pool.

Differs: max_seqs still limits the running texts. A prefix of several levels is found in the cache as far as it is there. While memory is
short, prefixes are not held. Attention over shared pages is the backend's own. The requests of a server come one by one, so they stay in
order of arrival, and only step 5 applies to them.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from redraft.card import Card, Guarantee
from redraft.core.plan import StepPlan
from redraft.core.sequence import Group, Sequence
from redraft.options import number
from redraft.sched.sarathi import Sarathi
from redraft.sched.scheduler import Pages

Page = tuple[str, tuple[int, ...]]  # salt, tokens


class Prompt(NamedTuple):
    """pages: those that others may share; tokens: all of the prompt; new: the tokens that are expected after it."""

    pages: list[Page]
    tokens: int
    new: int


class Sharing(NamedTuple):
    """Prompts that share their first `pages` pages, 0 if it is one prompt alone; members: their places, ascending."""

    pages: int
    members: list[int]


@dataclass
class _Node:
    """`length` pages from the root; count: prompts below; best: pages that need not be computed; prompt: a leaf's prompt, by its place."""

    length: int
    prompt: int = -1
    count: int = 0
    best: int = 0
    children: list[_Node] = field(default_factory=list)
    sharing: list[bool] = field(default_factory=list)  # of each child: whether it shares the prefix of this node

    def close(self) -> None:
        """All children are known: step 2."""
        self.count = 1 if self.prompt >= 0 else sum(child.count for child in self.children)
        apart = sum(child.best for child in self.children)
        together = sum(max(child.best, child.count * self.length) for child in self.children) - self.length
        self.best = max(apart, together)
        self.sharing = [together > apart and child.count * self.length >= child.best for child in self.children]

    def prompts(self) -> list[int]:
        found, below = [], [self]
        while below:
            node = below.pop()
            found += [node.prompt] if node.prompt >= 0 else []
            below += node.children
        return found


def _tree(texts: Seq[list[Page]]) -> _Node:
    """The closed tree of all prompts. A prompt is a leaf, and an inner node has two children or more."""
    open_nodes, before = [_Node(0)], None

    def fold(length: int) -> None:
        """Closes all nodes with more than `length` pages. The last open one has `length` then."""
        while open_nodes[-1].length > length:
            node = open_nodes.pop()
            node.close()
            if open_nodes[-1].length < length:
                open_nodes.append(_Node(length))
            open_nodes[-1].children.append(node)

    for place in sorted(range(len(texts)), key=lambda i: texts[i]):
        pages = texts[place]
        fold(0 if before is None else next((i for i, (a, b) in enumerate(zip(before, pages, strict=False)) if a != b), len(before)))
        open_nodes.append(_Node(len(pages) + 1, place))
        before = pages
    fold(0)
    open_nodes[0].close()
    return open_nodes[0]


def plan(prompts: Seq[Prompt], page: int) -> list[Sharing]:
    """Groups of all prompts, each in one of them, in the order in which they should run: steps 1 to 3. page: tokens of a page."""
    found, below = [], [_tree([prompt.pages for prompt in prompts])]
    while below:
        node = below.pop()
        if node.prompt >= 0:
            found.append(Sharing(0, [node.prompt]))
        if members := [i for child, shares in zip(node.children, node.sharing, strict=True) if shares for i in child.prompts()]:
            found.append(Sharing(node.length, sorted(members)))
        below += [child for child, shares in zip(node.children, node.sharing, strict=True) if not shares]

    def order(one: Sharing) -> tuple[float, int]:
        computed = sum(prompts[i].tokens for i in one.members) - (len(one.members) - 1) * one.pages * page
        return -sum(prompts[i].new for i in one.members) / computed, one.members[0]

    return sorted(found, key=order)


@dataclass(frozen=True)
class BatchLLM(Sarathi):
    """expected: the new tokens of a text that has no smaller max_tokens; None: as many as its max_tokens or the context allow."""

    expected: int | None = number(None, ge=1)

    card: ClassVar[Card] = Card(
        title="BatchLLM",
        paper="Zheng et al., BatchLLM: Optimizing Large Batched LLM Inference with Global Prefix Sharing and Throughput-oriented Token"
        " Batching, 2024, arXiv 2412.03594",
        guarantee=Guarantee.SAME_TEXT,
        needs="a batch that is known in advance: LLM.generate, redraft generate --prompts",
        deviates="max_seqs limits running texts; prefixes are not held while memory is short; attention is the backend's own",
        summary="Computes each shared prefix once; for offline batches",
    )

    def groups(self, waiting: Seq[Sequence], page: int) -> list[tuple[Group, list[Sequence]]]:
        prompts = []
        for seq in waiting:
            shared = 0 if seq.cache.reuse is not None else min(len(seq.tokens) - 1, seq.skippable)
            end = shared // page * page
            pages = [(seq.request.salt, tuple(seq.tokens[at : at + page])) for at in range(0, end, page)]
            prompts.append(Prompt(pages, len(seq.tokens), self.new(seq) * seq.params.n))
        return [
            (Group(tuple(waiting[members[0]].tokens[: pages * page])), [waiting[i] for i in members])
            for pages, members in plan(prompts, page)
        ]  # fmt: skip

    def new(self, seq: Sequence) -> int:
        """The tokens that are expected after the prompt."""
        given = [limit for limit in (seq.params.max_tokens, self.expected) if limit is not None]
        return min(given) if given else max(1, seq.sync_point + 1 - seq.prompt_len)

    def plan(self, waiting: Seq[Sequence], running: Seq[Sequence], table: Pages, least: int = 1) -> StepPlan:
        return super().plan(self._ready(waiting, running, table), running, table, least)

    def _ready(self, waiting: Seq[Sequence], running: Seq[Sequence], table: Pages) -> list[Sequence]:
        """The first texts that may be admitted: those whose prefix no other text computes in this step. Step 4."""
        computed: dict[Group, bool] = {}  # whether a text that runs or is admitted computes the prefix
        for seq in running:
            if (group := seq.request.group) is not None:
                computed[group] = computed.get(group, False) or seq.stored < len(group.prefix)
        found: list[Sequence] = []
        for seq in waiting:
            if len(running) + len(found) >= self.max_seqs:
                break
            group = seq.request.group
            if group is None or not computed.get(group, False):
                found.append(seq)
            if group is not None and group not in computed:
                computed[group] = table.match([*group.prefix, 0], seq.request.salt) < len(group.prefix)
        return found

    def reserve(self, seqs: Seq[Sequence], table: Pages) -> int:
        growth = sum(self._growth(seq, table) for seq in seqs) if len(seqs) > 1 else 0  # 5.
        return growth + super().reserve(seqs, table)

    def _growth(self, seq: Sequence, table: Pages) -> int:
        """The blocks that a text is expected to need beyond its pending tokens, its siblings that have not begun included."""
        pending = seq.pending + (not seq.stored)  # admission counts a token more
        last = seq.prompt_len + self.new(seq) - 1  # the last token is not stored
        texts = 1 + (seq.params.n - len(seq.request.sequences) if seq.stored < seq.prompt_len else 0)
        return texts * max(0, table.need(seq, max(pending, last - seq.stored)) - table.need(seq, pending))
