"""Replies of gpt-oss, in OpenAI's Harmony format: messages in channels. analysis is reasoning, final is content, and messages to
functions.NAME are calls."""

from __future__ import annotations

import re

from redraft.serve.parsers.grammar import TEXT, Calls, Words
from redraft.serve.parsers.reasoning import ReasoningScanner
from redraft.serve.parsers.scanner import CallScanner

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
TO = re.compile(r"\bto=functions\.([^\s<]+)")
HEADED = re.compile(r"(?:commentary|analysis)?\s*to=functions\.([^\s<]+)[^{]*?<\|message\|>\s*(?=\{)")


class HarmonyCalls(CallScanner):
    """Reads what Harmony leaves of a reply."""

    OPEN = (CHANNEL,)
    CLOSE = CALL
    ANYWHERE = False
    MARKS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL)

    @classmethod
    def fits(cls, template: str) -> bool:
        return CHANNEL in template and "functions." in template

    @classmethod
    def grammar(cls, calls: Calls, words: Words) -> str:
        begin = f"commentary to=functions.{{}} {CONSTRAIN}json{MESSAGE}"
        return f"rest: call\n{calls.rules(words, begin.format)}"

    def _head(self) -> bool:
        return self._headed(HEADED, self._after)


class Harmony(ReasoningScanner):
    """Leaves messages to functions as they are, with their marks."""

    OPEN = CHANNEL
    MARKS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL)

    def __init__(self, opened: bool) -> None:
        super().__init__(opened)
        self._header, self._kind, self._state = "", "", self._heading
        self._kinds = set[str]()  # of messages so far

    @classmethod
    def fits(cls, template: str) -> bool:
        return CHANNEL in template and "analysis" in template

    @classmethod
    def opened(cls, prompt: str) -> bool | None:
        return False

    @classmethod
    def grammar(cls, words: Words, opened: bool) -> str:
        return f"reasoning: {words.spell(f'{CHANNEL}analysis{MESSAGE}')} {TEXT} {words.spell(f'{END}{START}assistant')}"

    @classmethod
    def answer(cls) -> str:
        return f"{CHANNEL}final{MESSAGE}"

    def _text(self) -> bool:
        """Between two messages. Text that is in none is content."""
        text, mark = self._until(START, CHANNEL)
        self._said.content += text
        if mark:
            self._header, self._state = "", self._heading
        return bool(mark)

    def _heading(self) -> bool:
        """Role, channel and recipient. The prompt ends within the heading of the first message."""
        text, mark = self._until(START, CHANNEL, MESSAGE)
        self._header += f"{text} " if mark else text
        if mark == MESSAGE:
            self._address(self._header)
        elif self._ended and not mark and not self._kinds:
            self._said.content += self._header.rstrip(" ")
        return bool(mark)

    def _address(self, header: str) -> None:
        to = TO.search(header)
        if to is not None:
            self._kind = "call"
            self._said.content += f"{CHANNEL}commentary to=functions.{to[1]} {CONSTRAIN}json{MESSAGE}"
        else:
            self._kind = "reasoning" if "analysis" in header else "content"
            self._write("\n" * (self._kind in self._kinds))
        self._kinds.add(self._kind)
        self._state = self._body

    def _body(self) -> bool:
        text, mark = self._until(END, CALL, START)
        self._write(text)
        if not mark:
            return False
        if self._kind == "call":
            self._said.content += CALL
        self._header, self._state = "", self._heading if mark == START else self._text
        return True

    def _write(self, text: str) -> None:
        if self._kind == "reasoning":
            self._said.reasoning += text
        else:
            self._said.content += text
