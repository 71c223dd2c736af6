"""Tokens to text, a piece at a time. Text that a later token may still change waits, and so does the beginning of a stop string."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from typing import NamedTuple

from redraft.config import SamplingParams
from redraft.models.tokenizer import Decoder

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 6  # prompt tokens that are decoded along with the first new one, because decoders look at what precedes a token
RUN = 64  # byte tokens that wait for the end of their run
WINDOW = 1024  # tokens that wait for any other reason, such as a character that is never completed


class Text(NamedTuple):
    """The text of an output so far. tokens[first:read] is context that was already turned into text.

    A decoder with byte fallback turns a run of byte tokens into text as a whole: if one byte of it is invalid, every byte becomes
    U+FFFD. So no window begins or ends within such a run, and `done` joined over all steps is what the tokenizer gives for the whole
    text. The exceptions are runs of more than RUN tokens and characters that wait for more than WINDOW tokens.
    """

    done: str
    first: int
    read: int

    @classmethod
    def start(cls, prompt: Seq[int], decode: Decoder) -> Text:
        """No text yet. The context reaches back to the beginning of a run of byte tokens and to some text, if there is any."""
        first, size = len(prompt), CONTEXT
        while first and not decode(list(prompt[first:])):
            first, size = max(0, first - size), 2 * size
            while first and decode.ends_in_bytes(prompt[:first]):
                first -= 1
        return cls("", first, len(prompt))

    def extend(self, tokens: Seq[int], decode: Decoder, *, start: int = 0, last: bool = False) -> Text:
        """The text with all of `tokens`, of which only those from `start` (at most `first`) on are given. What a later token may
        change waits, unless these are the last."""
        window = list(tokens[self.first - start :])
        new = self._new(window, decode)
        if not last and len(window) < WINDOW:
            in_run = len(window) - (self.read - self.first) < RUN and decode.ends_in_bytes(window)
            if not new or new.endswith(REPLACEMENT) or in_run:
                return self
        return Text(self.done + new, self.read, self.first + len(window))

    def complete(self, tokens: Seq[int], decode: Decoder, *, start: int = 0) -> str:
        """`done` and the complete characters of a run of byte tokens that has not ended; invalid bytes in it could still change them."""
        window = list(tokens[self.first - start :])
        for _ in range(4):  # the bytes of one character
            if len(window) <= self.read - self.first or not decode.ends_in_bytes(window):
                break
            if not (new := self._new(window, decode)).endswith(REPLACEMENT):
                return self.done + new
            window.pop()
        return self.done

    def _new(self, window: list[int], decode: Decoder) -> str:
        """What the window adds to its context. A context that ends within a character, as a prompt may, gives it up when it is
        completed."""
        before, now = decode(window[: self.read - self.first]), decode(window)
        while before.endswith(REPLACEMENT) and not now.startswith(before):
            before = before[:-1]
        return now[len(before) :]


class Stop(NamedTuple):
    """A stop string that ended a text, and how many characters of the text precede it."""

    keep: int
    string: str


class Reading(NamedTuple):
    """One way to read the tokens of an output, and the stop strings that are searched in it. left_out: matches what this text has
    and the text of the output has not."""

    text: Text
    decode: Decoder
    stops: tuple[str, ...]
    left_out: re.Pattern[str] | None = None

    def visible(self, tail: str) -> int:
        """Characters of the output's text in the last characters of this one."""
        return len(self.left_out.sub("", tail) if self.left_out else tail)


class Reader:
    """The text of one output. Stop strings that hold a special token which the text leaves out are also searched in a second text, with
    special tokens. (A model may spell such a token in letters, too: then the text has it.)"""

    def __init__(self, prompt: Seq[int], params: SamplingParams, decode: Decoder, decode_all: Decoder | None) -> None:
        chosen = decode if params.skip_special_tokens or decode_all is None else decode_all
        with_special = tuple(stop for stop in params.stop if any(token in stop for token in chosen.special))
        self.readings = [Reading(Text.start(prompt, chosen), chosen, params.stop)]
        if with_special and decode_all is not None:
            left_out = re.compile("|".join(map(re.escape, sorted(chosen.special, key=len, reverse=True))))
            self.readings.append(Reading(Text.start(prompt, decode_all), decode_all, with_special, left_out))
        self._tokens, self._reported = len(prompt), 0

    def search(self, tokens: Seq[int], new: Seq[int]) -> Iterator[Stop | None]:
        """For each of the `new` tokens, the first stop string that ends with it. Characters count once they are complete. Nothing is
        kept: the tokens may still be dropped."""
        start = min(reading.text.first for reading in self.readings)
        tail, readings = [*tokens[start:], *new], self.readings
        old = len(tail) - len(new)
        before = [reading.text.complete(tail[:old], reading.decode, start=start) for reading in readings]
        for end in range(old + 1, len(tail) + 1):
            readings = [_extended(reading, tail[:end], start) for reading in readings]
            now = [reading.text.complete(tail[:end], reading.decode, start=start) for reading in readings]
            yield _first(readings, before, now)
            before = now

    def take(self, tokens: Seq[int], *, ended: bool, stop: Stop | None = None, include: bool = False) -> str:
        """The text since the last call. `ended`: there are no more tokens; `stop` ended them, and `include` says whether the text
        keeps it."""
        start = min(reading.text.first for reading in self.readings)
        tail = tokens[start:]
        for end in range(self._tokens + 1 - start, len(tail) + 1):  # one by one, whatever the step's size
            last = ended and end == len(tail)
            self.readings = [_extended(reading, tail[:end], start, last=last) for reading in self.readings]
        self._tokens = len(tokens)
        done = self.readings[0].text.done
        if stop is not None:
            done = done[: stop.keep] + (stop.string if include else "")
        elif not ended:
            done = done[: len(done) - max(_held_back(reading) for reading in self.readings)]
        text, self._reported = done[self._reported :], max(self._reported, len(done))
        return text


def _extended(reading: Reading, tokens: Seq[int], start: int, *, last: bool = False) -> Reading:
    return reading._replace(text=reading.text.extend(tokens, reading.decode, start=start, last=last))


def _first(readings: Seq[Reading], before: Seq[str], now: Seq[str]) -> Stop | None:
    """Of the stop strings that end in the new text of each reading, the first, and of those at one place the longest."""
    found = []
    for reading, old, text in zip(readings, before, now, strict=True):
        if place := find_stop(text, reading.stops, len(old)):
            keep = len(now[0]) - reading.visible(text[place[0] :])
            found.append((keep, -len(text[slice(*place)]), text[slice(*place)]))
    return Stop(min(found)[0], min(found)[2]) if found else None


def _held_back(reading: Reading) -> int:
    """Characters of the output's text that could be the beginning of a stop string."""
    size = held_back(reading.text.done, reading.stops)
    return reading.visible(reading.text.done[len(reading.text.done) - size :])


def find_stop(text: str, stops: Iterable[str], before: int) -> tuple[int, int] | None:
    """(begin, end) of the first stop string that ends after text[:before], the earliest and then the longest."""
    found = [(at, -len(stop)) for stop in stops if (at := text.find(stop, max(0, before - len(stop) + 1))) >= 0]
    if not found:
        return None
    at, length = min(found)
    return at, at - length


def held_back(text: str, stops: Iterable[str]) -> int:
    """How many characters at the end of `text` could be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for n in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:n]):
                longest = n
                break
    return longest
