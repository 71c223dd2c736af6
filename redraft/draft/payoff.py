"""Whether drafts pay for a request: the time that each drafter's kept tokens saved, less the time that its nodes and its drafting took.

A drafter whose balance falls below a small debt is stopped, tried again after a pause, and the pause doubles whenever it loses again, while
the debt that it may have halves twice. What it gained before counts only up to a limit. So a request loses the time of a few steps at most,
also where the cost model or the probabilities are wrong, and where nothing is drafted but looking for drafts takes time.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

from redraft.core.tree import TokenTree

PATIENCE, LEAST = 0.5, 0.25  # plain steps' time that a drafter may owe before it is stopped, and the smallest share of it after losses
CREDIT = 8.0  # plain steps' time that its gains count at most; a drafter with so much starts again with short pauses
PAUSE, LONGEST_PAUSE = 16, 256  # steps


class Prices(NamedTuple):
    """Seconds. token: of a token without drafts; node: what a drafted node added to the step; drafting: what the drafters needed for a
    request together, without what was charged to single ones."""

    token: float
    node: float
    drafting: float


class Payoff:
    """drafters: how many there are. Times in seconds."""

    def __init__(self, drafters: int) -> None:
        self.balance = [0.0] * drafters
        self.pause = [PAUSE] * drafters
        self.left = [0] * drafters  # steps until a stopped drafter is tried again
        self._active = tuple(range(drafters))

    @property
    def stopped(self) -> list[int]:
        return [i for i, left in enumerate(self.left) if left]

    def active(self) -> tuple[int, ...]:
        """The drafters that may draft in this step."""
        return self._active

    @property
    def wait(self) -> int:
        """Steps until a drafter is tried again, 0 while one is active."""
        return 0 if self._active else min(self.left)

    def charge(self, drafter: int, seconds: float) -> None:
        """The time that a drafter alone took."""
        self.balance[drafter] -= seconds

    def add(self, tree: TokenTree, path: Seq[int], prices: Prices, steps: int = 1) -> None:
        """One step; steps: so many have passed with it since the last call."""
        token, node, drafting = prices
        lost = []
        if self._active:
            share = drafting / len(self._active)
            for i in self._active:
                self.balance[i] -= share
            if len(tree):
                origins = [0] * len(tree) if tree.origins is None else tree.origins.tolist()
                for origin in origins:
                    self.balance[origin] -= node
                for kept in path:
                    self.balance[origins[kept]] += token
            for i in self._active:
                if self.balance[i] < -PATIENCE * token * max(LEAST, PAUSE / self.pause[i]):
                    lost.append(i)
                elif self.balance[i] >= CREDIT * token:
                    self.balance[i], self.pause[i] = CREDIT * token, PAUSE
        if lost or len(self._active) < len(self.left):
            self._turn(lost, steps)

    def _turn(self, lost: Seq[int], steps: int) -> None:
        """So many steps less to wait for stopped drafters; stops those that lost."""
        for i, left in enumerate(self.left):
            if i in lost:
                self.left[i] = self.pause[i]
                self.pause[i] = min(2 * self.pause[i], LONGEST_PAUSE)
                self.balance[i] = 0.0
            elif left:
                self.left[i] = max(0, left - steps)
        self._active = tuple(i for i, left in enumerate(self.left) if not left)
