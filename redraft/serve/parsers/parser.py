"""What a model says: content, reasoning and tool calls. A parser separates them while the text arrives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class CallPart:
    """A part of a tool call. index: the number of the call in the reply; id, name: in its first part only; arguments: the next characters
    of the JSON text of its arguments."""

    index: int
    arguments: str = ""
    name: str = ""
    id: str = ""


@dataclass(slots=True)
class Said:
    """A part of a reply, or the whole of it."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallPart] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)

    def followed_by(self, more: Said) -> Said:
        """Both parts, the parts of calls one by one."""
        return Said(self.content + more.content, self.reasoning + more.reasoning, self.calls + more.calls)

    def add(self, more: Said) -> None:
        """Appends a part. The parts of a call become one."""
        self.content += more.content
        self.reasoning += more.reasoning
        for part in more.calls:
            if part.index < len(self.calls):
                old = self.calls[part.index]
                self.calls[part.index] = CallPart(old.index, old.arguments + part.arguments, old.name or part.name, old.id or part.id)
            else:
                self.calls.append(part)


class Parser(Protocol):
    """The parser of one text. The joined parts do not depend on how the text was cut."""

    def feed(self, text: str) -> Said:
        """What the next characters of the text add. Characters that may belong to a mark are held back."""
        ...

    def end(self) -> Said:
        """What was held back, once the text has ended."""
        ...


class Plain:
    """All text is content."""

    def feed(self, text: str) -> Said:
        return Said(text)

    def end(self) -> Said:
        return Said()
