"""A cache policy as text, with places for a budget: "seam=name:option={tokens},...", joined by + if a request chooses several methods.

The options of a method that a budget sets are named on its card.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass

from redraft import registry
from redraft.card import Card
from redraft.engine.policies import SEAMS
from redraft.errors import InvalidInput, did_you_mean
from redraft.ops.format import PAGE

CACHE = ("keep", "codec", "read")  # the seams of SEAMS that store or read less
SINKS = 4  # tokens of a budget that {recent} leaves to the sinks
NUMBERS = ("tokens", "part", "recent", "paged", "speedup")


@dataclass(frozen=True)
class Policy:
    """text: as given; parts: (seam, method) with placeholders for numbers."""

    text: str
    parts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, text: str) -> Policy:
        """InvalidInput if the text is not a policy; UnknownMethod if there is no such method."""
        parts = []
        for part in registry.split(text, "+"):
            seam, equals, method = part.partition("=")
            if not equals or seam not in SEAMS:
                raise InvalidInput(f"policy = {text!r}: must be seam=name:option=value,...; seams: {', '.join(SEAMS)}")
            registry.method(seam, registry.parse(method)[0])
            parts.append((seam, method))
        if not parts or len(dict(parts)) < len(parts):
            raise InvalidInput(f"policy = {text!r}: must name one method or more, each of another seam")
        policy = cls(text, tuple(parts))
        if unknown := policy.places - {*NUMBERS}:
            raise InvalidInput(f"policy = {text!r}: no number {{{min(unknown)}}}: {did_you_mean(min(unknown), NUMBERS)}")
        return policy

    @property
    def name(self) -> str:
        return " + ".join(registry.parse(method)[0] for _, method in self.parts)

    @property
    def places(self) -> set[str]:
        """The names of its placeholders."""
        try:
            return {name for _, method in self.parts for _, name, _, _ in string.Formatter().parse(method) if name is not None}
        except ValueError:
            raise InvalidInput(f"policy = {self.text!r}: braces do not match") from None

    def at(self, budget: float, tokens: int) -> dict[str, str]:
        """Fields of SamplingParams for `budget` percent of a text of `tokens` tokens. {part}: of 1; {paged}: rounded up to whole pages;
        {recent}: without the sinks; {speedup}: the inverse of the budget."""
        held = budgeted(budget, tokens)
        numbers = held, f"{budget / 100:g}", max(1, held - SINKS), -(-held // PAGE) * PAGE, f"{100 / budget:g}"
        return {seam: method.format(**dict(zip(NUMBERS, numbers, strict=True))) for seam, method in self.parts}


def budgeted(budget: float, tokens: int) -> int:
    return math.ceil(budget / 100 * tokens)


def registered() -> list[Policy]:
    """Every registered method of CACHE, with the options that a budget sets; others have the defaults of their options. It is alone, or
    beside the method that its card names."""
    found = []
    for seam in CACHE:
        for name in registry.METHODS[seam]:
            card: Card = registry.method(seam, name).card  # type: ignore[attr-defined]
            own = f"{seam}={name}" + (f":{card.budget}" if card.budget else "")
            other, _, method = card.beside.partition("=")
            if not other or registry.parse(method)[0] in registry.METHODS[other]:
                found.append(Policy.of(f"{own}+{card.beside}" if other else own))
    return found
