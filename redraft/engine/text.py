"""Tokens to text, a piece at a time. Text that a later token may change is held back, as is the beginning of a stop string."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

from redraft.config import SamplingParams
from redraft.models.tokenizer import Decoder

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 6  # prompt tokens that are decoded with the first new one, because decoders look at preceding tokens
RUN = 64  # byte tokens that are held back until their run ends
WINDOW = 1024  # tokens that are held back for other reasons, such as an incomplete character


class PartialText(NamedTuple):
    """The text of an output so far. tokens[first:read] is context that is already in the text.

    A decoder with byte fallback decodes a run of byte tokens as a whole: if one byte is invalid, every byte becomes U+FFFD. So no
    window begins or ends within such a run. The joined pieces then equal what the tokenizer gives for the whole text. Exceptions are
    runs of more than RUN tokens and characters that stay incomplete for more than WINDOW tokens.
    """

    done: str
    first: int
    read: int

    @classmethod
    def start(cls, prompt: Seq[int], decode: Decoder) -> PartialText:
        """No text yet. The context begins before a run of byte tokens and includes some text, if there is any."""
        first, size = len(prompt), CONTEXT
        while first and not decode(list(prompt[first:])):
            first, size = max(0, first - size), 2 * size
            while first and decode.ends_in_bytes(prompt[:first]):
                first -= 1
        return cls("", first, len(prompt))

    def extend(self, tokens: Seq[int], decode: Decoder, *, start: int = 0, last: bool = False) -> PartialText:
        """The text with all of `tokens`. Only tokens from `start` (at most `first`) on are given. Text that a later token may change
        is held back, unless `last`."""
        window = list(tokens[self.first - start :])
        new = self._new(window, decode)
        if not last and len(window) < WINDOW:
            in_run = len(window) - (self.read - self.first) < RUN and decode.ends_in_bytes(window)
            if not new or new.endswith(REPLACEMENT) or in_run:
                return self
        return PartialText(self.done + new, self.read, self.first + len(window))

    def complete(self, tokens: Seq[int], decode: Decoder, *, start: int = 0) -> str:
        """`done` and the complete characters of an unfinished run of byte tokens. Invalid bytes in the run may still change them."""
        window = list(tokens[self.first - start :])
        for _ in range(4):  # the bytes of one character
            if len(window) <= self.read - self.first or not decode.ends_in_bytes(window):
                break
            if not (new := self._new(window, decode)).endswith(REPLACEMENT):
                return self.done + new
            window.pop()
        return self.done

    def _new(self, window: list[int], decode: Decoder) -> str:
        """The text that the window adds to its context. If the context ends within a character, as a prompt may, the new text holds
        the whole character."""
        before, now = decode(window[: self.read - self.first]), decode(window)
        while before.endswith(REPLACEMENT) and not now.startswith(before):
            before = before[:-1]
        return now[len(before) :]


class Stop(NamedTuple):
    """A stop string that ended a text, and how many characters of the text precede it."""

    keep: int
    string: str


@dataclass(slots=True)
class Reading:
    """One way to decode the tokens of an output, and the stop strings to search in it. left_out: matches text that this decoding has
    and the output's text does not have."""

    text: PartialText
    decode: Decoder
    stops: tuple[str, ...]
    left_out: re.Pattern[str] | None = None

    def visible(self, tail: str) -> int:
        """How many characters of `tail`, the end of this text, are in the output's text."""
        return len(self.left_out.sub("", tail) if self.left_out else tail)


class Reader:
    """The text of one output. If the text leaves out special tokens, stop strings that contain one are also searched in a second text
    that has them. (A model may also spell a special token in plain letters; the output's text contains those.)"""

    def __init__(self, prompt: Seq[int], params: SamplingParams, decode: Decoder, decode_all: Decoder | None) -> None:
        chosen = decode if params.skip_special_tokens or decode_all is None else decode_all
        with_special = tuple(stop for stop in params.stop if any(token in stop for token in chosen.special))
        self.readings = [Reading(PartialText.start(prompt, chosen), chosen, params.stop)]
        if with_special and decode_all is not None:
            left_out = re.compile("|".join(map(re.escape, sorted(chosen.special, key=len, reverse=True))))
            self.readings.append(Reading(PartialText.start(prompt, decode_all), decode_all, with_special, left_out))
        self._tokens, self._reported, self._stops = len(prompt), 0, bool(params.stop)

    def search(self, tokens: Seq[int], new: Seq[int]) -> Iterator[Stop | None]:
        """For each of the `new` tokens, the first stop string that ends with it. Only complete characters count. Changes no state,
        because the tokens may still be dropped."""
        start, readings = self._start(), self.readings
        tail, texts = [*tokens[start:], *new], [reading.text for reading in readings]
        old = len(tail) - len(new)
        before = [text.complete(tail[:old], one.decode, start=start) for text, one in zip(texts, readings, strict=True)]
        for end in range(old + 1, len(tail) + 1):
            texts = [text.extend(tail[:end], one.decode, start=start) for text, one in zip(texts, readings, strict=True)]
            now = [text.complete(tail[:end], one.decode, start=start) for text, one in zip(texts, readings, strict=True)]
            yield _first(readings, before, now)
            before = now

    def take(self, tokens: Seq[int], *, ended: bool, stop: Stop | None = None, include: bool = False) -> str:
        """The text since the last call. `ended`: no more tokens follow; `stop`: the stop string that ended the text; `include`: the
        text keeps the stop string."""
        start = self._start()
        tail = tokens[start:]
        for end in range(self._tokens + 1 - start, len(tail) + 1):  # token by token, so that the number of tokens a step changes nothing
            last = ended and end == len(tail)
            for reading in self.readings:
                reading.text = reading.text.extend(tail[:end], reading.decode, start=start, last=last)
        self._tokens = len(tokens)
        done = self.readings[0].text.done
        if stop is not None:
            done = done[: stop.keep] + (stop.string if include else "")
        elif not ended and self._stops:
            done = done[: len(done) - max(_held_back(reading) for reading in self.readings)]
        text, self._reported = done[self._reported :], max(self._reported, len(done))
        return text

    def _start(self) -> int:
        """The first token that any reading still decodes."""
        if len(self.readings) == 1:
            return self.readings[0].text.first
        return min(reading.text.first for reading in self.readings)


def _first(readings: Seq[Reading], before: Seq[str], now: Seq[str]) -> Stop | None:
    """The first stop string that ends in the new text of a reading; the longest of those at one place."""
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
    """(begin, end) of the earliest stop string that ends after text[:before]; the longest of those at one place."""
    found = [(at, -len(stop)) for stop in stops if (at := text.find(stop, max(0, before - len(stop) + 1))) >= 0]
    if not found:
        return None
    at, length = min(found)
    return at, at - length


def held_back(text: str, stops: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for n in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:n]):
                longest = n
                break
    return longest
