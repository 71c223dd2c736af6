"""Calls of DeepSeek: a list between marks. V3 and R1 write `function`, the name, and the arguments between fences; V3.1 the name and the
arguments."""

from __future__ import annotations

import re

from redraft.serve.parsers.grammar import Calls, Words
from redraft.serve.parsers.scanner import CallScanner

ALL, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
ONE, ONE_END, BETWEEN = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
FENCE = "\n```json\n"
HEADED = re.compile(rf"\s*(?:function{BETWEEN}([^\n<{{]+)\n```json\s*|([^\s<]+)\s*{BETWEEN}\s*)(?=\{{)")


class DeepSeek(CallScanner):
    OPEN = (ALL, ONE)
    CLOSE = ONE_END
    MARKS = (ALL, ALL_END, ONE, ONE_END, BETWEEN)

    @classmethod
    def grammar(cls, calls: Calls, words: Words) -> str:
        fenced = "```json" in words.template
        begin = f"{ONE}function{BETWEEN}{{}}{FENCE}" if fenced else f"{ONE}{{}}{BETWEEN}"
        end = f"\n```{ONE_END}" if fenced else ONE_END
        between = '"\\n" ' if fenced else ""
        more = f" ({between}call)*" if calls.parallel else ""
        return f"rest: call{more} {words.spell(ALL_END)}\n{calls.rules(words, begin.format, end)}"

    def _head(self) -> bool:
        self._state = self._one if self._opened == ONE else self._next
        return True

    def _next(self) -> bool:
        """Between two calls of the list."""
        found = self._skip(ONE, ALL_END)
        if found is None:
            return False
        if found == ONE:
            self._await(self._one, self._opened + self._taken)
        elif not self._called:
            self._opened += self._taken if found else ""
            return self._reject()
        else:
            self._state = self._text
        return True

    def _one(self) -> bool:
        return self._headed(HEADED, self._after)

    def _after(self) -> bool:
        """A fence may precede the mark."""
        found = self._skip(ONE_END, f"```{ONE_END}", "```")
        if found is None:
            return False
        self._opened, self._state = "", self._next
        return True
