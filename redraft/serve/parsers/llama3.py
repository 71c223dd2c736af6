"""Calls of Llama 3.1 to 3.3: {"name": ..., "parameters": {...}} as the whole reply, or after <|python_tag|>; `;` between several."""

from __future__ import annotations

from redraft.serve.parsers.grammar import Calls, Words, named
from redraft.serve.parsers.scanner import JsonScanner


class Llama3(JsonScanner):
    OPEN = ("<|python_tag|>",)
    MARKS = OPEN
    ANYWHERE = False

    def __init__(self) -> None:
        super().__init__()
        self._state = self._start

    @classmethod
    def fits(cls, template: str) -> bool:
        return cls.OPEN[0] in template or '"parameters": dictionary of argument name' in template

    @classmethod
    def begin(cls, words: Words) -> str:
        return ""

    @classmethod
    def grammar(cls, calls: Calls, words: Words) -> str:
        more = ' ("; " call)*' if calls.parallel else ""
        return f"rest: call{more}\n{calls.rules(words, named('parameters'), '}')}"

    def _start(self) -> bool:
        found = self._held.lstrip()
        if not found and not self._ended:
            return False
        self._await(self._head, "") if found.startswith("{") else self._to_text()
        return True

    def _after(self) -> bool:
        found = self._skip(";", "{")
        if found is None:
            return False
        if found == "{":
            self._held, self._taken = found + self._held, ""
        self._await(self._head, self._taken) if found else self._to_text()
        return True

    def _to_text(self) -> None:
        self._state = self._text
