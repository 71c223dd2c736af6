"""Every error that a user can cause or meet.

RedraftError
├── InvalidInput            a field, its value and what is allowed (also a ValueError)
│   ├── UnknownMethod       no such method; near names are suggested
│   └── PromptTooLong       the prompt does not fit the context
├── CheckpointError         a model folder that cannot be loaded: what and where
├── OutOfMemory             weights or cache pool do not fit; with the figures
├── Unavailable             what computes requests has stopped, or is not ready yet
└── Unsupported             a backend, method or format that lacks what was requested, by name
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "CheckpointError",
    "InvalidInput",
    "OutOfMemory",
    "PromptTooLong",
    "RedraftError",
    "Unavailable",
    "UnknownMethod",
    "Unsupported",
    "bounded",
    "did_you_mean",
    "shown",
]

MAX_VALUE = 200  # characters of a value in an error, at most
MAX_MESSAGE = 1000  # of a whole error, which may quote several

CUT = " [...] "


class RedraftError(Exception):
    """Base of everything Redraft raises on purpose; its text is one line for the user, of at most MAX_MESSAGE characters."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*(bounded(one) if isinstance(one, str) else one for one in given))


class InvalidInput(RedraftError, ValueError):
    """A parameter out of range: names the field, the value and what is allowed."""


class UnknownMethod(InvalidInput):
    """A method or option name that is not registered."""


class PromptTooLong(InvalidInput):
    """A prompt that leaves no room for one new token in the context."""


class CheckpointError(RedraftError):
    """A checkpoint that is missing, damaged or of a kind that Redraft does not read."""


class OutOfMemory(RedraftError):
    """Weights and cache pool exceed what the machine or container allows."""


class Unavailable(RedraftError):
    """What computes requests has stopped, or is not ready yet."""


class Unsupported(RedraftError):
    """A feature that this part lacks; never skipped silently."""


CLOSE = 0.75  # of the nearest name's likeness


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: near names, else all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    best = [difflib.SequenceMatcher(None, one, name).ratio() for one in near]
    near = [one for one, ratio in zip(near, best, strict=True) if ratio > CLOSE * best[0]]
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"known: {('; ' if any(', ' in one for one in known) else ', ').join(known)}"


def bounded(message: str) -> str:
    """The message without its middle if it is longer than MAX_MESSAGE: the field stands first, what is allowed last."""
    if len(message) <= MAX_MESSAGE:
        return message
    half = (MAX_MESSAGE - len(CUT)) // 2
    return f"{message[:half]}{CUT}{message[-half:]}"


def shown(value: Any) -> str:
    """A value as errors show it: one line, not long, whatever its repr does."""
    try:
        text = " ".join((str if isinstance(value, Exception) else repr)(value).split())
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."
