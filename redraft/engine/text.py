"""Tokens to text, a piece at a time: UTF-8 is never split, and text that may turn out to be a stop string is held back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import NamedTuple

Decode = Callable[[list[int]], str]
WINDOW = 64  # tokens without any text that are decoded again and again before they are let go
CONTEXT = 6  # prompt tokens decoded along with the first new one, for decoders that look at what stands before


class Text(NamedTuple):
    """The text of an output so far. tokens[first:read] is context that was already turned into text."""

    done: str
    first: int
    read: int

    @classmethod
    def start(cls, prompt_len: int) -> Text:
        return cls("", max(0, prompt_len - CONTEXT), prompt_len)

    def extend(self, tokens: Seq[int], decode: Decode, *, start: int = 0, last: bool = False) -> Text:
        """The text with all of `tokens`, of which only those from `start` (at most `first`) on are given; characters whose
        bytes are not complete wait, unless these are the last."""
        window = list(tokens[self.first - start :])
        before, now = decode(window[: self.read - self.first]), decode(window)
        if now.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return self
        if len(now) <= len(before) and len(window) < WINDOW:
            return self
        return Text(self.done + now[len(before) :], self.read, self.first + len(window))


def find_stop(text: str, stops: Iterable[str], before: int) -> tuple[int, int] | None:
    """(begin, end) of the first stop string that ends behind text[:before], the earliest and then the longest."""
    found = [(at, -len(stop)) for stop in stops if (at := text.find(stop, max(0, before - len(stop) + 1))) >= 0]
    if not found:
        return None
    at, length = min(found)
    return at, at - length


def held_back(text: str, stops: Iterable[str]) -> int:
    """How many characters at the end of `text` could be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for n in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:n]):
                longest = n
                break
    return longest
