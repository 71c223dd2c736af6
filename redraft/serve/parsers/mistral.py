"""Calls of Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}], and since 2025 [TOOL_CALLS]name[ARGS]{...} for each call."""

from __future__ import annotations

import re
import secrets
import string

from redraft.serve.parsers.grammar import Calls, Words, named
from redraft.serve.parsers.scanner import ListScanner

NAME, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
HEADED = re.compile(r"\s*([^\s\[\]{}]+)\s*(?:\[CALL_ID\][^\s\[\]{}]*\s*)?(?:\[ARGS\])?\s*(?=\{)")


class Mistral(ListScanner):
    OPEN = (NAME,)
    MARKS = (NAME, ID, ARGUMENTS)

    @staticmethod
    def new_id() -> str:
        """Its templates require 9 letters or digits."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    @classmethod
    def grammar(cls, calls: Calls, words: Words) -> str:
        if ARGUMENTS in words.template or ARGUMENTS in words.special:
            more = f" ({words.spell(NAME)} call)*" if calls.parallel else ""
            return f"rest: call{more}\n{calls.rules(words, lambda name: name + ARGUMENTS)}"
        more = ' (", " call)*' if calls.parallel else ""
        return f'rest: " "? "[" call{more} "]"\n{calls.rules(words, named("arguments"), "}")}'

    def _head(self) -> bool:
        found = self._held.lstrip()
        if not found and not self._ended:
            return False
        if found.startswith("["):
            return super()._head()
        self._state = self._name
        return True

    def _name(self) -> bool:
        return self._headed(HEADED, self._closed)
