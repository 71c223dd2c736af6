"""Regular expressions of JSON schemas (ECMA-262, found anywhere in a string) as expressions of whole strings in plain syntax.

The result has only characters, sets of characters, groups, alternatives and repetitions, which all libraries read alike. ECMA-262 and
Python's `re` differ in sets such as \\W. The result has the characters that are in both, or those that are in either.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache

from redraft.errors import InvalidInput

__all__ = ["WITHOUT_LOOK_AROUND", "Whole", "whole"]

MAX_LENGTH = 4096  # characters of a pattern
MAX_SIZE = 2000  # sets of characters after all repetitions are written out
MAX_NESTING = 30  # groups within groups

Ranges = tuple[tuple[int, int], ...]  # first and last code points, ascending, apart from each other

LAST = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)
DIGITS: Ranges = ((0x30, 0x39),)
LETTERS: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
SPACES: Ranges = (
    (0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F),
    (0x3000, 0x3000), (0xFEFF, 0xFEFF),
)  # fmt: skip
SPACES_OF_PYTHON: Ranges = ((0x1C, 0x1F), (0x85, 0x85))  # besides those of ECMA-262
BYTE_ORDER_MARK: Ranges = ((0xFEFF, 0xFEFF),)  # a space in ECMA-262 only
LINE_ENDS: Ranges = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
UNWRITTEN: Ranges = ((0x00, 0x07), (0x0B, 0x0B), (0x0E, 0x1F), (0x7F, 0x7F), SURROGATES)  # only \uXXXX writes them in JSON

NAMED = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D}
COUNTS = re.compile(r"\{(\d{1,9})(,(\d{0,9}))?\}")
WITHOUT_LOOK_AROUND = {  # patterns in wide use -> the same without look-around
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?(?:\d+\.?\d*|\.\d+)$",  # Decimal of pydantic 2.12 and 2.13
}
ANY = r"[\x{0}-\x{10FFFF}]*"


@dataclass(frozen=True)
class Whole:
    """An expression of whole strings. counted: size of the largest group that is counted and whose length varies, written out; 0 if
    there is none."""

    text: str
    counted: int


def whole(pattern: str, wide: bool = False) -> Whole:
    """An expression that matches a whole string iff `pattern` is found in it. Raises InvalidInput that says which part is not allowed.

    wide: a string matches if it does in any dialect, else only if it does in all.
    """
    if len(pattern) > MAX_LENGTH:
        raise InvalidInput(f"has {len(pattern)} characters; at most {MAX_LENGTH} are allowed")
    pattern = WITHOUT_LOOK_AROUND.get(pattern, pattern)
    parser = Parser(pattern, wide)
    parsed = parser.alternatives(0)
    if parser.at < len(pattern):
        raise InvalidInput(f"closes a group at character {parser.at} that was not opened")
    if parsed.size > MAX_SIZE:
        raise InvalidInput(f"repeats up to {parsed.size} characters; at most {MAX_SIZE} are allowed")
    return Whole(f"^(?:{parsed.text(Edge.OPEN, Edge.OPEN)})$", parser.counted)


def union(*sets: Ranges) -> Ranges:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(one for ranges in sets for one in ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return tuple(merged)


def complement(ranges: Ranges) -> Ranges:
    gaps, start = [], 0
    for first, last in ranges:
        if start < first:
            gaps.append((start, first - 1))
        start = last + 1
    return (*gaps, (start, LAST)) if start <= LAST else tuple(gaps)


def without(ranges: Ranges, removed: Ranges) -> Ranges:
    return complement(union(complement(ranges), removed))


@cache
def decimals() -> Ranges:
    """All characters that Python's \\d matches."""
    return union(tuple((code, code) for code in range(0x20000) if chr(code).isdecimal()))


class Edge(Enum):
    """What is at one side of a part."""

    OPEN = auto()  # anything, unless an anchor forbids it
    SHUT = auto()  # the end of the string
    INNER = auto()  # another part


@dataclass(frozen=True)
class Anchor:
    """^ or $. text_at_end: what may still follow $."""

    sign: str
    text_at_end: str = ""
    size = 0

    def text(self, left: Edge, right: Edge) -> str:
        raise InvalidInput(f"has {self.sign} at a place other than its start or end, which is not supported")


START = Anchor("^")
END = Anchor("$")
WIDE_END = Anchor("$", r"\x{A}?")  # Python's $ also matches before a line end


@dataclass(frozen=True)
class Set:
    """One character out of a set."""

    ranges: Ranges
    size = 1

    def text(self, left: Edge, right: Edge) -> str:
        return f"[{''.join(f'{one(first)}-{one(last)}' if last > first else one(first) for first, last in self.ranges)}]"


def one(code: int) -> str:
    return chr(code) if chr(code).isascii() and chr(code).isalnum() else f"\\x{{{code:X}}}"


@dataclass(frozen=True)
class Repeated:
    """A part and its quantifier."""

    part: Part
    quantifier: str
    size: int

    def text(self, left: Edge, right: Edge) -> str:
        return f"(?:{self.part.text(Edge.INNER, Edge.INNER)}){self.quantifier}"


@dataclass(frozen=True)
class Row:
    """Parts one after the other."""

    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def varies(self) -> bool:
        return any(isinstance(part, Repeated) or (isinstance(part, Either) and part.varies) for part in self.parts)

    @property
    def anchored(self) -> bool:
        return any(isinstance(part, Anchor) or (isinstance(part, Either) and part.anchored) for part in self.parts)

    def text(self, left: Edge, right: Edge) -> str:
        parts, end = list(self.parts), ""
        while left is not Edge.INNER and parts and parts[0] == START:
            del parts[0]
            left = Edge.SHUT
        while right is not Edge.INNER and parts and isinstance(last := parts[-1], Anchor) and last != START:
            del parts[-1]
            right, end = Edge.SHUT, last.text_at_end
        if not parts:
            return ANY if Edge.OPEN in (left, right) else end
        deep_left = isinstance(parts[0], Either) and parts[0].anchored
        deep_right = isinstance(parts[-1], Either) and parts[-1].anchored
        edges = [(Edge.INNER, Edge.INNER) for _ in parts]
        edges[0] = left if deep_left else Edge.INNER, edges[0][1]
        edges[-1] = edges[-1][0], right if deep_right else Edge.INNER
        text = "".join(part.text(*edge) for part, edge in zip(parts, edges, strict=True))
        return f"{ANY if left is Edge.OPEN and not deep_left else ''}{text}{ANY if right is Edge.OPEN and not deep_right else end}"


@dataclass(frozen=True)
class Either:
    """A group, or the whole pattern: one of several rows."""

    rows: tuple[Row, ...]

    @property
    def size(self) -> int:
        return sum(row.size for row in self.rows)

    @property
    def varies(self) -> bool:
        """Whether it matches strings of different lengths, as far as it is plain to see."""
        return len(self.rows) > 1 or any(row.varies for row in self.rows)

    @property
    def anchored(self) -> bool:
        return any(row.anchored for row in self.rows)

    def text(self, left: Edge, right: Edge) -> str:
        return f"(?:{'|'.join(row.text(left, right) for row in self.rows)})"


Part = Anchor | Set | Repeated | Either


class Parser:
    """Reads a pattern from left to right; `at` is the next character."""

    def __init__(self, pattern: str, wide: bool) -> None:
        self.pattern, self.wide = pattern, wide
        self.at = self.counted = 0

    def peek(self, ahead: int = 0) -> str:
        return self.pattern[self.at + ahead : self.at + ahead + 1]

    def take(self) -> str:
        if self.at >= len(self.pattern):
            raise InvalidInput("ends too early")
        self.at += 1
        return self.pattern[self.at - 1]

    def refuse(self, what: str) -> InvalidInput:
        return InvalidInput(f"has {what} at character {self.at}, which is not supported")

    def alternatives(self, nesting: int) -> Either:
        if nesting > MAX_NESTING:
            raise InvalidInput(f"nests groups deeper than {MAX_NESTING}")
        rows = [self.row(nesting)]
        while self.peek() == "|":
            self.at += 1
            rows.append(self.row(nesting))
        return Either(tuple(rows))

    def row(self, nesting: int) -> Row:
        parts: list[Part] = []
        while self.peek() not in ("", "|", ")"):
            part = self.part(nesting)
            counted = self.counts()
            if counted is None:
                parts.append(part)
                continue
            if isinstance(part, Anchor):
                raise self.refuse("a repeated anchor")
            quantifier, most = counted
            if isinstance(part, Either) and part.anchored:
                raise self.refuse("an anchor in a repeated group")
            parts.append(Repeated(part, quantifier, part.size * max(1, most)))
            if most > 1 and isinstance(part, Either) and part.varies:
                self.counted = max(self.counted, parts[-1].size)
        return Row(tuple(parts))

    def counts(self) -> tuple[str, int] | None:
        """The quantifier at this place, if there is one, and the copies of its part that it stands for."""
        sign, found = self.peek(), COUNTS.match(self.pattern, self.at)
        if sign and sign in "*+?":
            self.at += 1
            result = sign, 1
        elif found:
            least, most = int(found[1]), int(found[3]) if found[3] else int(found[1])
            if most < least:
                raise self.refuse("a repetition that ends before it starts")
            self.at = found.end()
            result = found[0], most
        else:
            return None
        if self.peek() == "?":  # lazy: the same strings match
            self.at += 1
        if self.peek() and (self.peek() in "*+?" or COUNTS.match(self.pattern, self.at)):
            raise self.refuse("a quantifier after a quantifier")
        return result

    def part(self, nesting: int) -> Part:
        sign = self.take()
        if sign == "^":
            return START
        if sign == "$":
            return WIDE_END if self.wide else END
        if sign == ".":
            return self.of(complement(LINE_ENDS[:1] if self.wide else LINE_ENDS))
        if sign == "(":
            return self.group(nesting)
        if sign == "[":
            return self.set()
        if sign == "\\":
            sure, possible, _ = self.escape(within=False)
            return self.of(possible if self.wide else sure)
        if sign in "*+?" or (sign == "{" and (COUNTS.match(self.pattern, self.at - 1) or self.peek() == ",")):
            self.at -= 1
            raise self.refuse(f"the quantifier {sign} without a part before it")
        return self.of(((ord(sign), ord(sign)),))

    def group(self, nesting: int) -> Either:
        if self.peek() == "?":
            kind = self.pattern[self.at : self.at + 3]
            name = re.compile(r"\?<[A-Za-z_$][\w$]*>").match(self.pattern, self.at)
            if kind.startswith("?:"):
                self.at += 2
            elif name:
                self.at = name.end()
            else:
                looks = kind[:2] in ("?=", "?!") or kind in ("?<=", "?<!")
                raise self.refuse("a look-around" if looks else f"the group ({kind}")
        found = self.alternatives(nesting + 1)
        if self.take() != ")":
            raise InvalidInput("ends too early")
        return found

    def of(self, ranges: Ranges) -> Set:
        ranges = without(ranges, UNWRITTEN)
        if not ranges:
            raise self.refuse("a set that no character of a text is in")
        return Set(ranges)

    def set(self) -> Set:
        negated = self.peek() == "^"
        self.at += negated
        if self.peek() == "]":
            raise self.refuse("an empty set")
        sure: Ranges = ()  # in every dialect
        possible: Ranges = ()  # in some dialect
        while (sign := self.take()) != "]":
            first = self.escape(within=True) if sign == "\\" else single(sign)
            ranged = self.peek() == "-" and self.peek(1) not in ("]", "") and first[2]
            if ranged:
                self.at += 1
                sign = self.take()
                last = self.escape(within=True) if sign == "\\" else single(sign)
                low, high = first[0][0][0], last[0][0][0]
                if not last[2] or high < low:
                    raise self.refuse("a range without order")
                first = ((low, high),), ((low, high),), True
            sure, possible = union(sure, first[0]), union(possible, first[1])
        return self.of(complement(sure if self.wide else possible) if negated else (possible if self.wide else sure))

    def escape(self, within: bool) -> tuple[Ranges, Ranges, bool]:
        """The characters after a backslash: those surely meant, those possibly meant, whether it is a single one."""
        sign = self.take()
        if sign in "dDwWsS":
            sure, possible = self.named(sign.lower())
            return (sure, possible, False) if sign.islower() else (complement(possible), complement(sure), False)
        if sign in NAMED:
            return single(chr(NAMED[sign]))
        if sign == "b" and within:
            return single("\b")
        if sign == "0" and not self.peek().isdigit():
            return single("\0")
        if sign in "xu":
            return single(self.hexadecimal(2 if sign == "x" else 4))
        if sign.isalnum() and sign.isascii():
            raise self.refuse(f"\\{sign}")
        return single(sign)

    def named(self, sign: str) -> tuple[Ranges, Ranges]:
        own = {"d": DIGITS, "w": LETTERS, "s": SPACES}[sign]
        if sign == "d":
            return own, decimals()
        if sign == "w":
            return own, union(own, ((0x80, LAST),))
        return without(own, BYTE_ORDER_MARK), union(own, SPACES_OF_PYTHON)

    def hexadecimal(self, digits: int) -> str:
        code = self.code(digits)
        if SURROGATES[0] <= code <= 0xDBFF and self.pattern[self.at : self.at + 2] == "\\u":
            self.at += 2
            code = 0x10000 + (code - 0xD800) * 0x400 + self.code(4) - 0xDC00
        if SURROGATES[0] <= code <= SURROGATES[1] or code > LAST:
            raise self.refuse("half a character")
        return chr(code)

    def code(self, digits: int) -> int:
        text = self.pattern[self.at : self.at + digits]
        if not re.fullmatch(f"[0-9A-Fa-f]{{{digits}}}", text):
            raise self.refuse("an escape without its digits")
        self.at += digits
        return int(text, 16)


def single(sign: str) -> tuple[Ranges, Ranges, bool]:
    alone = ((ord(sign), ord(sign)),)
    return alone, alone, True
