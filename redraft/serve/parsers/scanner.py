"""What parsers have in common: a text that arrives in pieces is searched for marks, and each part goes to where it belongs."""

from __future__ import annotations

import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from redraft.config import is_utf8
from redraft.engine.text import held_back
from redraft.serve.parsers.grammar import Calls, Words
from redraft.serve.parsers.parser import CallPart, Said

State = Callable[[], bool]

HEAD = 4096  # characters within which a call's name ends and its arguments begin
CLOSES = {"{": "}", "[": "]"}
NAMED = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
KEY = re.compile(r'\{\s*(?:"(?P<key>[^"\\]*)"|[^"\s])')  # the first one of an object, or what makes it none
KEYS = ("name", "arguments", "parameters", "type", "id")  # with which the object of a call may begin


class Scanner(ABC):
    """Base of parsers. A state, a method, takes what it can from the front of `_held` and returns whether there is more to do. At a
    place where more text could change what it does, it returns False and waits, unless the text has ended."""

    def __init__(self) -> None:
        self._held, self._taken, self._blank, self._ended, self._called = "", "", "", False, False
        self._said = Said()
        self._state: State = self._text

    def feed(self, text: str) -> Said:
        self._held += text
        return self._run()

    def end(self) -> Said:
        self._ended = True
        said = self._run()
        if not self._called:
            said.content += self._blank
        self._blank = ""
        return said

    def _run(self) -> Said:
        self._said = Said()
        while self._state():
            pass
        return self._said

    @abstractmethod
    def _text(self) -> bool:
        """The first state."""

    def _until(self, *marks: str) -> tuple[str, str]:
        """Takes the text before the first of these marks, and the mark. While there is none: the text that belongs to none, and ""."""
        found = [(at, -len(mark), mark) for mark in marks if (at := self._held.find(mark)) >= 0]
        if found:
            at, _, mark = min(found)
            text, self._held = self._held[:at], self._held[at + len(mark) :]
            return text, mark
        size = len(self._held) - (0 if self._ended else held_back(self._held, marks))
        text, self._held = self._held[:size], self._held[size:]
        return text, ""

    def _skip(self, *marks: str) -> str | None:
        """Takes white space and the longest of these marks, which is returned; "" if none of them follows, None if that is not known
        yet. What is taken is in `_taken`."""
        found = self._held.lstrip()
        if not self._ended and any(mark != found and mark.startswith(found) for mark in marks):
            return None
        mark = max((mark for mark in marks if found.startswith(mark)), key=len, default="")
        if mark:
            size = len(self._held) - len(found) + len(mark)
            self._taken, self._held = self._held[:size], self._held[size:]
        return mark

    def _say(self, text: str) -> None:
        """Adds content. White space waits: that before a call is dropped."""
        text = self._blank + text
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        self._said.content += kept


class Value:
    """Finds the end of a JSON object or list while its text arrives. broken: its brackets do not match, so it has no end. inside: the
    brackets that are open at its begin."""

    def __init__(self, inside: str = "") -> None:
        self.broken = False
        self._due = [CLOSES[bracket] for bracket in reversed(inside)]
        self._quoted = self._escaped = False

    def end(self, text: str) -> int | None:
        """The index after its last character in this next piece of text; None if it does not end there."""
        for i, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = letter == "\\", letter != '"'
            elif letter == '"':
                self._quoted = True
            elif letter in CLOSES:
                self._due.append(CLOSES[letter])
            elif letter in "}]":
                if not self._due or self._due.pop() != letter:
                    self.broken = True
                    return None
                if not self._due:
                    return i + 1
        return None


class CallScanner(Scanner):
    """Base of the parsers of tool calls. OPEN: the marks that begin calls; CLOSE: the mark after a call, up to which arguments whose
    brackets do not match reach; without one, up to the end. MARKS: all marks. ANYWHERE: whether calls begin with a mark wherever they are,
    so that a grammar can constrain them in a text that may have none."""

    OPEN: ClassVar[tuple[str, ...]]
    CLOSE: ClassVar[str] = ""
    MARKS: ClassVar[tuple[str, ...]]
    ANYWHERE: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self._count = 0
        self._opened = ""  # what was taken of a call that may still turn out to be none
        self._value, self._whole, self._seen = Value(), Value(), 0
        self._then = self._after  # the state after the arguments

    @classmethod
    def fits(cls, template: str) -> bool:
        """Whether the calls of a chat template have this form."""
        return cls.OPEN[0] in template

    @classmethod
    def begin(cls, words: Words) -> str:
        """What the first call of a reply begins with."""
        return cls.OPEN[0]

    @classmethod
    @abstractmethod
    def grammar(cls, calls: Calls, words: Words) -> str:
        """Rules in llguidance's form. The rule `rest` is what follows `begin`: one of the calls or, if they may be parallel, more."""

    @staticmethod
    def new_id() -> str:
        """Of a call."""
        return f"call_{secrets.token_hex(12)}"

    def _text(self) -> bool:
        text, mark = self._until(*self.OPEN)
        self._say(text)
        if mark:
            self._await(self._head, mark)
        return bool(mark)

    def _await(self, state: State, mark: str) -> None:
        """Goes to the state that reads the head of a call after this mark."""
        self._state, self._opened, self._whole, self._seen = state, mark, Value(), 0

    @abstractmethod
    def _head(self) -> bool:
        """What precedes the arguments of a call."""

    def _after(self) -> bool:
        """What follows a call. By default: its closing mark, which may be missing."""
        if self._skip(self.CLOSE) is None:
            return False
        self._state = self._text
        return True

    def _reject(self) -> bool:
        """This is no call: what was taken is content, and what is held is read again as text."""
        self._say(self._opened)
        self._state = self._text
        return True

    def _begin(self, name: str, arguments: str = "") -> None:
        self._called, self._blank = True, ""
        self._said.calls.append(CallPart(self._count, arguments, name, self.new_id()))
        self._count += 1

    def _headed(self, pattern: re.Pattern[str], then: State) -> bool:
        """A head that matches a pattern with groups of which one is the name, and then the arguments, an object. then: the state after
        these."""
        found = pattern.match(self._held[:HEAD])
        if found is None:
            return (self._ended or len(self._held) >= HEAD) and self._reject()
        self._begin(next(name for name in found.groups() if name))
        return self._to_arguments(found.end(), then)

    def _to_arguments(self, size: int, then: State) -> bool:
        """Takes so much, after which the arguments begin."""
        self._held, self._value, self._state, self._then = self._held[size:], Value(), self._arguments, then
        return True

    def _arguments(self) -> bool:
        size = self._value.end(self._held)
        if self._value.broken:
            self._state = self._torn
            return True
        self._argue(self._held[:size])
        self._held = "" if size is None else self._held[size:]
        if size is not None:
            self._state = self._then
        return size is not None

    def _torn(self) -> bool:
        """The rest of arguments that are no JSON."""
        text, mark = self._until(self.CLOSE) if self.CLOSE else (self._held, "")
        self._held = self._held if self.CLOSE else ""
        self._argue(text)
        if mark:
            self._state = self._text
        return bool(mark)

    def _argue(self, text: str) -> None:
        calls = self._said.calls
        if text and calls and calls[-1].index == self._count - 1:
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + text)
        elif text:
            calls.append(CallPart(self._count - 1, text))


class JsonScanner(CallScanner):
    """Base of the parsers of formats in which a call is a JSON object with its name and its arguments."""

    def _head(self) -> bool:
        if self._seen < HEAD:  # later it is known that these cannot be
            begin = self._held[:HEAD]
            if found := NAMED.match(begin):
                name = _loaded(found["name"])
                if not _named(name):
                    return self._reject()
                self._begin(name)
                self._whole, self._seen = Value("{"), 0
                return self._to_arguments(found.end(), self._rest)
            begin = begin.lstrip()
            first = KEY.match(begin)
            if (begin and begin[0] != "{") or (first and first["key"] not in KEYS):
                return self._reject()
        size = self._whole.end(self._held[self._seen :])
        if size is None:
            self._seen = len(self._held)
            return (self._ended or self._whole.broken) and self._reject()
        size += self._seen
        call = _loaded(self._held[:size])
        arguments = _of_call(call)
        if arguments is None:
            return self._reject()
        self._begin(call["name"], arguments)
        self._held, self._state = self._held[size:], self._after
        return True

    def _rest(self) -> bool:
        """The rest of the object after the arguments: its bracket, and fields that no call has. If it does not end, it is content."""
        if self._held.lstrip()[:1] in ("", "}", ","):
            size = self._whole.end(self._held[self._seen :])
            if size is None:
                self._seen = len(self._held)
                if not self._ended and not self._whole.broken:
                    return False
            else:
                self._held = self._held[self._seen + size :]
        self._state = self._after
        return True


class ListScanner(JsonScanner):
    """Base of the parsers of formats in which calls are a JSON list."""

    def _head(self) -> bool:
        found = self._skip("[")
        if found == "":
            return self._reject()
        if found:
            self._await(self._item, self._opened + self._taken)
        return found is not None

    def _item(self) -> bool:
        return super()._head()

    def _after(self) -> bool:
        found = self._skip(",", "]")
        if found is None:
            return False
        if found == ",":
            self._await(self._item, self._taken)
        else:
            self._state = self._closed
        return True

    def _closed(self) -> bool:
        return super()._after()


def _loaded(text: str) -> Any:
    """The value of JSON text; None if it is none, or too deep."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _of_call(call: Any) -> str | None:
    """The arguments in the object of a call, as JSON text; None if it is no call."""
    if not isinstance(call, dict) or not _named(call.get("name")):
        return None
    found = call.get("arguments", call.get("parameters"))
    if isinstance(found, str):  # JSON within JSON
        found = _loaded(found)
        return json.dumps(found) if isinstance(found, dict) else None
    return json.dumps(found or {}) if isinstance(found, dict | None) else None


def _named(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and is_utf8(name)
