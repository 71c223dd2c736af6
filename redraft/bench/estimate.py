"""The duration of a comparison, estimated from short runs of each method."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """read: tokens of prompts; written: tokens one after the other. Conversations that run at once count once."""

    read: int
    written: int

    def __add__(self, other: Work) -> Work:
        return Work(self.read + other.read, self.written + other.written)


@dataclass(frozen=True)
class Pace:
    """Seconds for each token that is read and for each that is written."""

    read: float
    written: float

    @classmethod
    def of(cls, short: Work, short_seconds: float, long: Work, long_seconds: float) -> Pace:
        """From two runs over the same prompts, the second with more new tokens. If the second run was not slower, or
        wrote no more, all of its time counts as writing, so that the estimate is rather too long."""
        more = long.written - short.written
        if more <= 0 or long_seconds <= short_seconds:
            return cls(0.0, long_seconds / max(1, long.written))
        written = (long_seconds - short_seconds) / more
        return cls(max(0.0, short_seconds - written * short.written) / max(1, short.read), written)

    def seconds(self, work: Work) -> float:
        return self.read * work.read + self.written * work.written


def duration(seconds: float) -> str:
    """A duration in words: "40 seconds", "6 minutes", "1.5 hours"."""
    if seconds < 90:
        return _count(max(1, round(seconds)), "second")
    if seconds < 90 * 60:
        return _count(round(seconds / 60), "minute")
    return f"{seconds / 3600:.1f} hours"


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'s' * (number > 1)}"
