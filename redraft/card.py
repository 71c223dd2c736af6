"""What a method claims about itself. Docs, `redraft methods` and the contracts are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Guarantee(IntEnum):
    """From strongest to weakest, so that the guarantee of a configuration is the `max` of its parts."""

    SAME_TEXT = 0  # the tokens of the plain loop with the same seed
    SAME_TEXT_GREEDY = 1  # the same at temperature 0, the same distribution otherwise
    SAME_DISTRIBUTION = 2  # the target's distribution, other tokens
    NEAR = 3  # small numerical differences, bounded and stated
    LOSSY = 4  # changes the text by design
    NONE = 5

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True)
class Card:
    """paper: "authors, title, year, arXiv id"; needs: what must exist besides the target; deviates: how it differs from the paper;
    summary: what it does and when to use it, at most 57 characters."""

    title: str
    paper: str
    guarantee: Guarantee
    needs: str = "nothing"
    deviates: str = "nothing"
    summary: str = ""
