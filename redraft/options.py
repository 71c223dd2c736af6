"""Hyper-parameters of methods. As in config.py, an option's allowed range is declared next to its default; it is checked here."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from redraft import registry
from redraft.errors import InvalidInput, shown


class Range(NamedTuple):
    """Bounds of a finite number: ge and le are inclusive, gt and lt exclusive; multiple_of: 0 means any number."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    multiple_of: int = 0

    def __contains__(self, value: object) -> bool:
        return (
            isinstance(value, (int, float))
            and math.isfinite(value)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
            and (not self.multiple_of or value % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        if self.ge is not None and self.le is not None:
            return f"{self.ge:.12g} to {self.le:.12g}"
        words = {"{:.12g} or more": self.ge, "above {:.12g}": self.gt, "{:.12g} or less": self.le, "below {:.12g}": self.lt}
        found = [word.format(bound) for word, bound in words.items() if bound is not None]
        return " and ".join([f"a multiple of {self.multiple_of}", *found] if self.multiple_of else found)


def number(
    default: float | None,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    multiple_of: int = 0,
    kw_only: bool = False,
) -> Any:
    """A dataclass field of an `Options` class: a number in this range. None is allowed if the default is None."""
    return dataclasses.field(default=default, kw_only=kw_only, metadata={"range": Range(ge, gt, le, lt, multiple_of)})


def word(default: str, *others: str) -> Any:
    """A dataclass field of an `Options` class: one of these words."""
    return dataclasses.field(default=default, metadata={"words": (default, *others)})


class Options:
    """Base class of methods, which are frozen dataclasses of hyper-parameters. InvalidInput names the option, its value and the
    allowed range."""

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):  # type: ignore[arg-type]
            allowed, value = option.metadata.get("range"), getattr(self, option.name)
            if (words := option.metadata.get("words")) and value not in words:
                raise InvalidInput(f"{registry.name_of(type(self))}:{option.name}={shown(value)}: must be {', '.join(words)}")
            if allowed is not None and value not in allowed and (value is not None or option.default is not None):
                raise InvalidInput(f"{registry.name_of(type(self))}:{option.name}={shown(value)}: must be {allowed}")
