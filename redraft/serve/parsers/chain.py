"""A parser after the other, and the special tokens that no parser needs to see."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from redraft.engine.text import held_back
from redraft.serve.parsers.parser import CallPart, Parser, Said


class Chain:
    """The second parser reads what the first leaves as content."""

    def __init__(self, first: Parser, second: Parser) -> None:
        self.first, self.second = first, second

    def feed(self, text: str) -> Said:
        return self._further(self.first.feed(text))

    def end(self) -> Said:
        return self._further(self.first.end()).followed_by(self.second.end())

    def _further(self, said: Said) -> Said:
        found = self.second.feed(said.content)
        return Said(found.content, said.reasoning + found.reasoning, found.calls)


class Single:
    """At most one call of what a parser reads."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser

    def feed(self, text: str) -> Said:
        return self._first(self.parser.feed(text))

    def end(self) -> Said:
        return self._first(self.parser.end())

    @staticmethod
    def _first(said: Said) -> Said:
        calls: list[CallPart] = [part for part in said.calls if part.index == 0]
        return Said(said.content, said.reasoning, calls)


class Unspecial:
    """Takes special tokens out of a text that has them. hidden: their ids and spellings. A spelling that is no such token stays: a
    model may write <s> in plain letters."""

    def __init__(self, hidden: Mapping[int, str]) -> None:
        self.hidden = hidden
        self._due = list[str]()  # tokens that have come, and their text has not
        self._held = ""

    def feed(self, text: str, tokens: Seq[int], *, last: bool) -> str:
        """The next characters without them. tokens: those that have come since the last call."""
        self._due += [self.hidden[token] for token in tokens if token in self.hidden]
        self._held += text
        found = ""
        while places := [(at, i) for i, one in enumerate(self._due) if (at := self._held.find(one)) >= 0]:
            at, i = min(places)
            found += self._held[:at]
            self._held = self._held[at + len(self._due[i]) :]
            del self._due[: i + 1]
        size = len(self._held) - (0 if last else held_back(self._held, self._due))
        found, self._held = found + self._held[:size], self._held[size:]
        return found
