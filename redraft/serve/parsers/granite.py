"""Calls of Granite 3: <|tool_call|>[{"name": ..., "arguments": {...}}]."""

from __future__ import annotations

from redraft.serve.parsers.grammar import Calls, Words, named
from redraft.serve.parsers.scanner import ListScanner


class Granite(ListScanner):
    OPEN = ("<|tool_call|>",)
    CLOSE = "<|/tool_call|>"
    MARKS = (*OPEN, CLOSE)

    @classmethod
    def grammar(cls, calls: Calls, words: Words) -> str:
        more = ' (", " call)*' if calls.parallel else ""
        return f'rest: " "? "[" call{more} "]"\n{calls.rules(words, named("arguments"), "}")}'
