"""Reasoning between marks at the begin of a reply, such as <think>...</think> of DeepSeek-R1, Qwen3 and SmolLM3. If the template has put
the first mark into the prompt, the reply has the last one only."""

from __future__ import annotations

from typing import ClassVar

from redraft.serve.parsers.grammar import Words
from redraft.serve.parsers.reasoning import ReasoningScanner


class Think(ReasoningScanner):
    OPEN = "<think>"
    CLOSE: ClassVar[str] = "</think>"
    MARKS = (OPEN, CLOSE)

    def __init__(self, opened: bool) -> None:
        super().__init__(opened)
        self._space = ""  # of the reasoning, where more may follow: it is dropped at the begin and the end
        self._state = self._start
        self._opened, self._reasoned = opened, False

    @classmethod
    def fits(cls, template: str) -> bool:
        return cls.CLOSE in template

    @classmethod
    def opened(cls, prompt: str) -> bool | None:
        prompt = prompt.rstrip()
        return None if prompt.endswith(cls.CLOSE) else prompt.endswith(cls.OPEN)

    @classmethod
    def grammar(cls, words: Words, opened: bool) -> str:
        first = "" if opened else words.spell(cls.OPEN)
        return f"reasoning: {first} thought /\\n{{0,2}}/\n{words.up_to('thought', cls.CLOSE)}"

    def _start(self) -> bool:
        """The first mark may come even if the prompt has it."""
        found = self._skip(self.OPEN)
        if found is None:
            return False
        self._state = self._thought if found or self._opened else self._text
        return True

    def _thought(self) -> bool:
        text, mark = self._until(self.CLOSE)
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :] if self._reasoned or kept else ""
        self._said.reasoning += kept if self._reasoned else kept.lstrip()
        self._reasoned = self._reasoned or bool(kept)
        if mark:
            self._state = self._between
        return bool(mark)

    def _between(self) -> bool:
        """White space between the reasoning and the answer is neither."""
        self._held = self._held.lstrip()
        if self._held:
            self._state = self._text
        return bool(self._held)

    def _text(self) -> bool:
        self._said.content += self._held
        self._held = ""
        return False
