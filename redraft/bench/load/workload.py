"""The requests to a server and their times: arrivals by Poisson or from a trace; prompts of random words, with or without shared
prefixes, or from a file."""

from __future__ import annotations

import csv
import json
import math
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Any, TypeVar

from redraft.errors import InvalidInput

T = TypeVar("T")

INPUT, OUTPUT, REQUESTS = 128, 64, 100  # tokens, tokens and requests where nothing says how many
COLUMNS = (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), ("arrival", "input", "output"))  # the first are those of Azure's traces


@dataclass(frozen=True)
class Ask:
    """One request. due: seconds after the start at which to send it; None: as soon as another has ended.

    Either the text is given, as `prompt` or `messages`, or `input_len` random tokens are made for it, of which the first `shared`
    are those of its `group`. output_len: tokens to generate.
    """

    index: int
    due: float | None
    output_len: int
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    input_len: int | None = None
    shared: int = 0
    group: int = 0


@dataclass(frozen=True)
class Load:
    """The load that the user requested. rate: requests a second, Poisson; inf: all at once, or with `concurrency` a closed loop.

    concurrency: most requests in flight. trace, scale: a CSV file with arrivals and lengths, and how many times faster it is
    played. prompts: a JSONL file. count: requests; else the whole trace or file, or 100. shared, groups: each prompt starts with
    `shared` tokens of one of `groups` groups. warmups: requests before the measurement. seed: of all draws.
    """

    rate: float | None = None
    concurrency: int | None = None
    trace: Path | None = None
    scale: float = 1.0
    prompts: Path | None = None
    count: int | None = None
    input_len: int | None = None
    output_len: int | None = None
    shared: int = 0
    groups: int | None = None
    warmups: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("concurrency", self.concurrency, 1),
            ("num-prompts", self.count, 1),
            ("input-len", self.input_len, 1),
            ("output-len", self.output_len, 1),
            ("shared-prefix", self.shared, 0),
            ("groups", self.groups, 1),
            ("warmups", self.warmups, 0),
        ):
            if value is not None and value < least:
                raise InvalidInput(f"{name} = {value}: must be {least} or more")
        if self.rate is not None and not self.rate > 0:
            raise InvalidInput(f"rate = {self.rate:g}: requests a second above 0, or inf, are needed")
        if not 0 < self.scale < math.inf:
            raise InvalidInput(f"trace-scale = {self.scale:g}: a number above 0 is needed")
        if self.groups is not None and not self.shared:
            raise InvalidInput(f"groups = {self.groups}: only with shared-prefix")
        given = {
            "rate": self.rate,
            "prompts": self.prompts,
            "input-len": self.input_len,
            "output-len": self.output_len,
            "shared-prefix": self.shared or None,
        }
        for option, source, others in (("trace", self.trace, tuple(given)), ("prompts", self.prompts, ("input-len", "shared-prefix"))):
            for other in others:
                if source is not None and given[other] is not None:
                    raise InvalidInput(f"{other} = {given[other]}: not together with {option}, which sets it already")
        if self.trace is None and self.scale != 1:
            raise InvalidInput(f"trace-scale = {self.scale:g}: only with trace")

    @property
    def closed(self) -> bool:
        """Whether requests are sent when another ends, and not at planned times."""
        return self.trace is None and self.concurrency is not None and self.requests_a_second == math.inf

    @property
    def requests_a_second(self) -> float:
        return math.inf if self.rate is None else self.rate

    def asks(self) -> tuple[list[Ask], list[Ask]]:
        """(warm-ups, requests). Warm-ups are the requests that would follow the last one, so that caches do not know the measured ones.
        A file that is too short is repeated."""
        if self.trace is not None:
            rows = read_trace(self.trace, self.count)
            all_ = [Ask(i, at / self.scale, output, input_len=read) for i, (at, read, output) in enumerate(rows)]
            again = [Ask(len(all_) + i, None, row.output_len, input_len=row.input_len) for i, row in enumerate(_cycle(all_, self.warmups))]
            return again, all_
        lines = None if self.prompts is None else read_prompts(self.prompts)
        count = self.count or (REQUESTS if lines is None else len(lines))
        due: list[float | None] = [None] * count if self.closed else [*poisson(count, self.requests_a_second, self.seed)]
        due += [None] * self.warmups
        output = self.output_len or OUTPUT
        if lines is not None:
            texts = _cycle(lines, len(due))
            found = [Ask(i, at, wanted or output, **text) for i, (at, (text, wanted)) in enumerate(zip(due, texts))]
        else:
            length = self.shared + (self.input_len or INPUT)
            groups = [i % (self.groups or 1) for i in range(count)]
            random.Random(f"groups {self.seed}").shuffle(groups)
            groups += [i % (self.groups or 1) for i in range(self.warmups)]
            found = [Ask(i, at, output, input_len=length, shared=self.shared, group=groups[i]) for i, at in enumerate(due)]
        return found[count:], found[:count]


def _cycle(items: list[T], count: int) -> list[T]:
    return list(islice(cycle(items), count))


# ---- arrivals


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """Times at which requests arrive independently of each other, `rate` a second; inf: all at 0. As in vLLM they are stretched so
    that the last request comes at count / rate, because the rate of a short run may otherwise differ much from `rate`."""
    if math.isinf(rate):
        return [0.0] * count
    draw = random.Random(f"arrivals {seed}")
    times = list(accumulate(draw.expovariate(1.0) for _ in range(count)))
    return [time * count / rate / times[-1] for time in times]


def read_trace(path: Path, count: int | None = None) -> list[tuple[float, int, int]]:
    """(seconds after the first, input tokens, output tokens) of the first `count` rows, by time."""
    found = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = next((names for names in COLUMNS if set(names) <= set(reader.fieldnames or ())), None)
            if names is None:
                raise InvalidInput(f"trace = {path}: needs the columns {' or '.join(','.join(some) for some in COLUMNS)}")
            for row in islice(reader, count):
                try:
                    at, read, output = _seconds(row[names[0]]), int(row[names[1]]), int(row[names[2]])
                except (TypeError, ValueError):
                    raise InvalidInput(f"trace = {path}, line {reader.line_num}: needs a time and two whole numbers") from None
                if min(read, output) < 1:
                    raise InvalidInput(f"trace = {path}, line {reader.line_num}: lengths must be 1 or more")
                found.append((at, read, output))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"trace = {path}: cannot be read: {error}") from None
    if not found:
        raise InvalidInput(f"trace = {path}: has no rows")
    found.sort(key=lambda row: row[0])
    first = found[0][0]
    return [(at - first, read, output) for at, read, output in found]


def _seconds(text: str) -> float:
    """A number of seconds, or a date with a time."""
    try:
        value = float(text)
    except ValueError:
        date = datetime.fromisoformat(text.strip())
        return date.replace(tzinfo=date.tzinfo or UTC).timestamp()
    if not math.isfinite(value):
        raise ValueError(text)
    return value


# ---- prompts


def read_prompts(path: Path) -> list[tuple[dict[str, Any], int | None]]:
    """For each line the "prompt" or "messages" of an Ask, and the tokens to generate if the line has them."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"prompts = {path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_prompt(json.loads(line)))
            except ValueError as error:
                raise InvalidInput(f"prompts = {path}, line {number}: {error}") from None
    if not found:
        raise InvalidInput(f"prompts = {path}: has no prompts")
    return found


def _prompt(line: Any) -> tuple[dict[str, Any], int | None]:
    if not isinstance(line, dict) or ("prompt" in line) == ("messages" in line):
        raise ValueError('needs one of the keys "prompt" and "messages"')
    if not isinstance(line.get("prompt", ""), str) or not isinstance(line.get("messages", []), list):
        raise ValueError('"prompt" must be a text, "messages" a list')
    output = line.get("max_tokens", line.get("output_len"))
    if output is not None and (type(output) is not int or output < 1):
        raise ValueError('"max_tokens" or "output_len" must be a whole number of 1 or more')
    return {name: line[name] for name in ("prompt", "messages") if name in line}, output


# ---- random words

STEM = "The"  # every prompt's first word
COMMON = """
a all also an and any are as at back be been but by can come could day do down each end even find first for from get give go good great had
has have he her here him his home how if in into is it its just know large last life like line little long look made make man many may me
men more most much must my name never new no not now number of off old on one only or other our out over own part people place right said
same say see set she small so some state still such take than that the their them then there these they thing think this time to two under
up us use very was water way we well were what when where which while who will with word work world would year you your
"""
WORDS = tuple(" " + word for word in COMMON.split())
LETTERS = tuple("etaoinshrdlucmfwypvbgkqjxz")  # for vocabularies in which words are several tokens, such as letters
ENOUGH = 12  # different units that a random text needs
REPEATS, MIXED = 8, 64  # words in the test texts, which show whether each is one token


@dataclass(frozen=True)
class Words:
    """Random text of a given length. units: its words, each of one token; overhead: further tokens of a prompt. exact: whether the
    server counted them; else each word is assumed to be one token."""

    units: tuple[str, ...] = WORDS
    overhead: int = 1
    exact: bool = False

    def prompt(self, ask: Ask, seed: int) -> str:
        assert ask.input_len is not None
        shared = max(ask.shared - self.overhead, 0) if ask.shared else 0
        own = max(ask.input_len - self.overhead - shared, 0)
        return STEM + self.text(f"prefix {seed} {ask.group}", shared) + self.text(f"prompt {seed} {ask.index}", own)

    def text(self, seed: str, count: int) -> str:
        return "".join(random.Random(seed).choices(self.units, k=count))
