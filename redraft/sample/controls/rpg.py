"""Makes the token less likely that would begin yet another copy of a piece of Python code, by its structure, not its words.

Yihong Dong, Yuchen Liu, Xue Jiang, Bin Gu, Zhi Jin, Ge Li: Rethinking Repetition Problems of LLMs in Code Generation, 2025,
arXiv 2505.10402.

1. The text is reduced to grammar rules: identifiers and literals are one each, whatever they are.
2. n is the number of equal blocks of rules at the end, back to back; of all lengths of a block, the largest number counts.
3. From n = `start` on, where a block has just ended, the tokens that began the copies are critical.
4. The probability of critical tokens is multiplied by decay ** (n - start + 1), at most `cap` times decay, and all are scaled to sum to 1.

Differs: a rule is a line of Python with its indentation, in place of a reduction of a pushdown automaton; that of a comment is its text.
Only new text counts. From a line on that no Python has, the text stays as it is. start, decay and cap are ours.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from redraft.card import Card, Guarantee
from redraft.core.sequence import Sequence
from redraft.errors import InvalidInput
from redraft.options import Options, number
from redraft.sample.controls.control import Stage
from redraft.sample.processors.processor import Path, Row, Vocabulary

LINES = 512  # the newest, which are compared
WORD = re.compile(
    r"(?P<triple>[rbuRBUfF]{0,2}(?:\"{3}|'{3}))"
    r"|(?P<string>[rbuRBUfF]{0,2}(?:\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'))"
    r"|(?P<number>\.?\d[\w.]*)|(?P<name>[^\W\d]\w*)|(?P<space>[\s\\]+)|(?P<comment>#.*)"
    r"|(?P<sign>->|:=|\*\*=?|//=?|<<=?|>>=?|[-+*/%@&|^<>=!]=|[-+*/%@&|^~<>=()\[\]{},:;.])"
)
FIRST = {"match", "case", "type"}  # names that may stand before another name, at a line's start
VALUES = ("name", "number", "string")  # kinds of which no two are neighbours

Shape = tuple[str, ...]


@dataclass(frozen=True)
class RPG(Options):
    """decay: of a critical token's probability, for each copy from `start` on; start: copies; period: the most lines of a block; cap: the
    largest power of decay."""

    decay: float = number(0.9, gt=0, le=1)
    start: int = number(3, ge=2, le=LINES)
    period: int = number(64, ge=1, le=LINES // 2)
    cap: int = number(16, ge=1, le=LINES)

    card: ClassVar[Card] = Card(
        "Repetition penalization by grammar",
        "Dong, Liu, Jiang, Gu, Jin, Li, Rethinking Repetition Problems of LLMs in Code Generation, 2025, arXiv 2505.10402",
        Guarantee.LOSSY,
        needs="a text in Python; others stay as they are",
        deviates="rules are lines, in place of a pushdown automaton's; Python only; new text only; start, decay and cap are ours",
        summary="Fewer copies of one structure in a row; for code",
    )

    def open(self, vocabulary: Vocabulary) -> Code:
        if vocabulary.bytes_of is None:
            raise InvalidInput("rpg: needs a model with a tokenizer")
        return Code(self, vocabulary.bytes_of)


class Parsed(NamedTuple):
    """line: the bytes since the last newline; opener: the token with the first of them that is no space, -1 without one; quote: marks
    of the string that is open; lines: the shape and the opener of each line; copies: equal blocks at their end; critical: the openers of
    these; python: False from a line on that is no Python."""

    line: bytes = b""
    opener: int = -1
    quote: str = ""
    lines: tuple[tuple[Shape, int], ...] = ()
    copies: int = 1
    critical: frozenset[int] = frozenset()
    python: bool = True


@dataclass(frozen=True, eq=False)
class Code:
    method: RPG
    bytes_of: Callable[[int], bytes]
    stage: ClassVar[Stage] = Stage.LOGITS

    def begin(self, seq: Sequence) -> Writing:
        return Writing(self.method, Path(lambda seq: Parsed(), self.advance))

    def advance(self, state: Parsed, token: int) -> Parsed:
        if not state.python:
            return state
        first, *rest = self.bytes_of(token).split(b"\n")
        state = _extended(state, first, token)
        for part in rest:
            state = _extended(self.closed(state), part, token)
        return state

    def closed(self, state: Parsed) -> Parsed:
        """After the newline."""
        try:
            shape, quote = shape_of(state.line.decode(), state.quote)
        except ValueError:
            return Parsed(python=False)
        if not shape:
            return state._replace(line=b"", opener=-1, quote=quote)
        lines = (*state.lines, (shape, state.opener))[-LINES:]
        return Parsed(b"", -1, quote, lines, *copies(lines, self.method.period))


def _extended(state: Parsed, part: bytes, token: int) -> Parsed:
    return state._replace(line=state.line + part, opener=token if state.opener < 0 and part.strip() else state.opener)


@dataclass(frozen=True, eq=False)
class Writing:
    method: RPG
    path: Path[Parsed]

    def apply(self, row: Row) -> None:
        state = self.path.at(row.seq, row.drafted)
        if not state.python or state.copies < self.method.start or state.quote or state.line.strip():
            return
        power = min(state.copies - self.method.start + 1, self.method.cap)
        row.values[sorted(state.critical)] += power * math.log(self.method.decay)  # 4.


def shape_of(line: str, quote: str) -> tuple[Shape, str]:
    """The rules of a line, empty without any, and the marks of the string that is open behind it. quote: those before it. ValueError for
    what is no Python."""
    at = 0
    if quote:
        if (end := line.find(quote)) < 0:
            return (), quote
        at, quote = end + len(quote), ""
    found, last = [f"{len(line.expandtabs()) - len(line.expandtabs().lstrip())}"], ""
    while at < len(line):
        word = WORD.match(line, at)
        if word is None or word.lastgroup is None:
            raise ValueError(f"no Python: {line}")
        kind, text, at = word.lastgroup, word[0], word.end()
        if kind == "triple":
            quote = text[-3:]
            end = line.find(quote, at)
            kind, at, quote = "string", len(line) if end < 0 else end + 3, quote if end < 0 else ""
        if kind == "space" or (kind == "comment" and len(found) > 1):
            continue
        if kind in ("sign", "comment") or keyword.iskeyword(text):
            found.append(text)
            last = ""
            continue
        if last in VALUES and (last, kind) != ("string", "string"):
            raise ValueError(f"no Python: {line}")
        soft = kind == "name" and len(found) == 1 and text in FIRST
        found.append(text if soft else kind)
        last = "" if soft else kind
    return tuple(found) if len(found) > 1 else (), quote


def copies(lines: tuple[tuple[Shape, int], ...], period: int) -> tuple[int, frozenset[int]]:
    """How often the last block occurs at the end, back to back, for the length of a block with the most copies; and their first openers."""
    shapes, most, length = [shape for shape, _ in lines], 1, 1
    for size in range(1, min(period, len(shapes) // 2) + 1):
        n = 1
        while shapes[len(shapes) - (n + 1) * size : len(shapes) - n * size] == shapes[-size:]:
            n += 1
        if n > most:
            most, length = n, size
    firsts = range(len(lines) - most * length, len(lines), length)
    return most, frozenset(lines[at][1] for at in firsts)
