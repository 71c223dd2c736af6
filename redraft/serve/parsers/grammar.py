"""Grammars that force tool calls, in llguidance's form of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from redraft.sample.grammars.form import COMPILED_AS

TEXT = "/(?s:.*)/"


@dataclass(frozen=True)
class Words:
    """What a grammar needs to know of a model. template: of its chats; special: the spellings of its special tokens, and their ids."""

    template: str
    special: Mapping[str, int]

    def spell(self, text: str) -> str:
        """A text as Lark writes it. In a grammar special tokens are no text, so they are named by their ids."""
        if not self.special:
            return _quoted(text)
        marks = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        parts = [part for part in re.split(f"({marks})", text) if part]
        return " ".join(f"<[{self.special[part]}]>" if part in self.special else _quoted(part) for part in parts)

    def up_to(self, rule: str, mark: str, unless: str = "") -> str:
        """A rule for any text up to the first of this mark, which it includes. unless: see text."""
        terminal = rule.upper()
        if mark in self.special:
            return f"{rule}: {terminal} {self.spell(mark)}\n{terminal}: {TEXT}{self._unless(unless)}"
        return f"{rule}[lazy]: {terminal}\n{terminal}: /(?s:.*){_escaped(mark)}/{self._unless(unless)}"

    def text(self, rule: str, unless: str) -> str:
        """A rule for any text. unless: a mark with which it may not begin, if that is no special token."""
        return f"{rule}: {rule.upper()}\n{rule.upper()}: {TEXT}{self._unless(unless)}"

    def _unless(self, mark: str) -> str:
        return rf" & ~/\s*{_escaped(mark)}(?s:.*)/" if mark and mark not in self.special else ""


@dataclass(frozen=True)
class Calls:
    """The calls that a grammar allows. schemas: name of the function -> JSON schema of its arguments; parallel: several in one reply."""

    schemas: Mapping[str, Any]
    parallel: bool

    def rules(self, words: Words, begin: Callable[[str], str], end: str = "") -> str:
        """The rule `call`: for each function the text that begin makes of its name, the arguments, and `end`."""
        names = list(self.schemas)
        found = ["call: " + " | ".join(f"call_{i}" for i in range(len(names)))]
        for i, name in enumerate(names):
            found.append(f"call_{i}: {words.spell(begin(name))} arguments_{i}" + (f" {words.spell(end)}" if end else ""))
            found.append(f"arguments_{i}: {json_rule(self.schemas[name])}")
        return "\n".join(found)


def json_rule(schema: dict[str, Any]) -> str:
    """JSON that follows a schema, which is checked."""
    return f"%json {json.dumps(schema | {'x-guidance': COMPILED_AS})}"


def named(key: str) -> Callable[[str], str]:
    """The begin of a call that is an object with the name and, as this key, the arguments."""
    return lambda name: f'{{"name": {json.dumps(name)}, "{key}": '


def _escaped(text: str) -> str:
    """A text in a regular expression."""
    return re.escape(text).replace("/", r"\/")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
