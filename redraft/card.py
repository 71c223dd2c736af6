"""A method's description of itself. The docs, `redraft methods` and the contract tests are generated from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Guarantee(IntEnum):
    """Ordered from strongest to weakest: the guarantee of a configuration is the `max` over its methods."""

    SAME_TEXT = 0  # the same tokens as plain decoding with the same seed
    SAME_TEXT_GREEDY = 1  # the same tokens at temperature 0, the same distribution otherwise
    SAME_DISTRIBUTION = 2  # the target's distribution, but other tokens for the same seed
    NEAR = 3  # small numerical differences with a stated bound
    LOSSY = 4  # changes the text by design
    NONE = 5

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", "-")


NOTHING = "nothing"


@dataclass(frozen=True)
class Card:
    """paper: "authors, title, year, arXiv id"; needs: what must exist besides the target; deviates: differences from the paper;
    summary: what the method does and when to use it, at most 57 characters; budget: the options of a cache policy that a budget sets, with
    numbers in braces (engine/budgets.py), empty for none; beside: another cache policy with which it is measured, because it does nothing
    alone, likewise, as "seam=name:option=value"."""

    title: str
    paper: str
    guarantee: Guarantee
    needs: str = NOTHING
    deviates: str = "nothing"
    summary: str = ""
    budget: str = ""
    beside: str = ""
