"""Calls of Hermes, Qwen 2.5 and 3, SmolLM3 and Granite 4: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

from redraft.serve.parsers.grammar import Calls, Words, named
from redraft.serve.parsers.scanner import JsonScanner


class Hermes(JsonScanner):
    OPEN = ("<tool_call>",)
    CLOSE = "</tool_call>"
    MARKS = (*OPEN, CLOSE)

    @classmethod
    def fits(cls, template: str) -> bool:
        """Qwen3-Coder and GLM have the same mark around arguments that are no JSON."""
        return cls.OPEN[0] in template and "arguments" in template and "<function=" not in template and "<arg_key>" not in template

    @classmethod
    def grammar(cls, calls: Calls, words: Words) -> str:
        more = f" ({words.spell(chr(10) + cls.OPEN[0])} one)*" if calls.parallel else ""
        one = f'one: "\\n" call {words.spell(chr(10) + cls.CLOSE)}'
        return f"rest: one{more}\n{one}\n{calls.rules(words, named('arguments'), '}')}"
