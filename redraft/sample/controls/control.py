"""The interface of controls (seam "control"): methods that change the distribution of a request's tokens as its text goes on.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(vocabulary)`. What it opens lives as long as the
engine. `begin` makes what lives as long as a text, and again after a preemption and for each of n texts, so it follows from tokens.
A row has the tokens of its own tree node's path, so controls work on trees and never roll back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from enum import StrEnum
from typing import Any, ClassVar, Protocol

from redraft import registry
from redraft.card import Card
from redraft.core.sequence import Sequence
from redraft.errors import InvalidInput
from redraft.sample.processors.processor import Row, Vocabulary

MOST = 64  # opened controls that are kept
PARTS = 8  # controls of a request


class Stage(StrEnum):
    """Where a control acts. LOGITS: after the temperature, before a grammar and the filters, so that an id is its own place. FILTERED:
    after all filters. CHECK: at the draw, see RunningCheck."""

    LOGITS = "logits"
    FILTERED = "filtered"
    CHECK = "check"


class RunningControl(Protocol):
    """A control of one text, at stage LOGITS or FILTERED."""

    def apply(self, row: Row) -> None:
        """Changes row.values in place, or drops tokens with row.keep, at least one stays."""
        ...


class RunningCheck(Protocol):
    """A control of one text, at stage CHECK. It is asked about the tokens as they would be drawn, until it accepts one."""

    def accepts(self, seq: Sequence, drafted: list[int], token: int) -> bool:
        """Whether `token` may follow seq.tokens and `drafted`."""
        ...


class OpenControl(Protocol):
    stage: Stage

    def begin(self, seq: Sequence) -> Any:
        """A RunningControl, or a RunningCheck at stage CHECK, for the text so far."""
        ...


class Control(Hashable, Protocol):
    """A registered control: hyper-parameters only."""

    card: ClassVar[Card]

    def open(self, vocabulary: Vocabulary) -> OpenControl:
        """InvalidInput or Unsupported if the vocabulary lacks what it needs."""
        ...


class OpenedControls:
    """The controls that requests of an engine chose. Each is opened once; the least recently used ones are closed."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._found: OrderedDict[Hashable, OpenControl] = OrderedDict()

    def get(self, control: Control) -> OpenControl:
        if control not in self._found:
            self._found[control] = control.open(self.vocabulary)
        self._found.move_to_end(control)
        while len(self._found) > MOST:
            self._found.popitem(last=False)
        return self._found[control]


def controls(chosen: Any) -> list[Control]:
    """The controls of SamplingParams.control: named in a text, or objects. Raises UnknownMethod or InvalidInput, one line each."""
    found: list[Control] = []
    for part in chosen if isinstance(chosen, tuple) else (chosen,):
        found += [registry.create("control", text) for text in registry.split(part, "+")] if isinstance(part, str) else [part]
    if len(found) > PARTS:
        raise InvalidInput(f"control has {len(found)} parts: at most {PARTS} are allowed")
    return found
