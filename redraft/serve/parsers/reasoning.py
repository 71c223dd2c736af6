"""Parsers that take the reasoning out of a reply. What they leave as content, a parser of tool calls may read further."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from redraft.serve.parsers.grammar import Words
from redraft.serve.parsers.scanner import Scanner


class ReasoningScanner(Scanner):
    """OPEN: the mark that begins reasoning; MARKS: all marks. opened: the prompt has begun the reasoning, so the reply begins within it."""

    OPEN: ClassVar[str]
    MARKS: ClassVar[tuple[str, ...]]

    def __init__(self, opened: bool) -> None:
        super().__init__()

    @classmethod
    @abstractmethod
    def fits(cls, template: str) -> bool:
        """Whether the replies of a chat template have this form."""

    @classmethod
    @abstractmethod
    def opened(cls, prompt: str) -> bool | None:
        """Whether a prompt ends within reasoning; None: after it, so the reply has none."""

    @classmethod
    @abstractmethod
    def grammar(cls, words: Words, opened: bool) -> str:
        """Rules in llguidance's form. The rule `reasoning` is the reasoning with its marks, of which `opened` lacks the first."""

    @classmethod
    def answer(cls) -> str:
        """What precedes an answer that is no tool call."""
        return ""
