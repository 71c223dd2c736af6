"""The requests of a simulation: when they arrive, how long their prompts and outputs are, and what their prompts share.

Files are CSV tables like Azure's traces, or JSON lines like Mooncake's, whose hashes name blocks of a prompt. Arrivals may also be drawn.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil, exp, inf
from pathlib import Path
from typing import Any, NamedTuple

from redraft import registry
from redraft.bench.load.workload import read_trace
from redraft.errors import InvalidInput, shown
from redraft.options import Options, number
from redraft.sim.forced import ForcedRequest, forced
from redraft.sim.runner import VOCAB

SIZE = 512  # tokens of a block of Mooncake's traces
FIELDS = {"timestamp": (int, float), "input_length": (int,), "output_length": (int,)}


class Arrival(NamedTuple):
    """One request. at: seconds; prompt, output: tokens, 1 or more; blocks: a name for each `size` tokens of the prompt. Prompts whose first
    names are equal begin with the same tokens. Without names a prompt shares nothing."""

    at: float
    prompt: int
    output: int
    blocks: Seq[int] = ()
    size: int = SIZE


def requests(arrivals: Iterable[Arrival]) -> Iterator[tuple[float, ForcedRequest]]:
    """The arrivals as requests with token ids, which are made when they are needed. Outputs and prompts without names consist of a token
    that no other request has."""
    for index, (at, length, count, blocks, size) in enumerate(arrivals):
        own = VOCAB - 1 - index
        prompt = [token for name in blocks for token in [name] * size][:length]
        prompt += [own] * (length - len(prompt))
        yield at, forced(index, prompt, [own] * count)


@dataclass(frozen=True)
class Trace:
    """Arrivals in order of time, the first at 0. about: in words."""

    arrivals: Seq[Arrival]
    about: str

    @property
    def rate(self) -> float:
        """Mean requests a second; inf if all arrive at once."""
        span = self.arrivals[-1].at
        return (len(self.arrivals) - 1) / span if span else inf

    def cut(self, count: int) -> Trace:
        """`count` requests. A trace that is too short begins again, with prompts that share nothing with those of before."""
        once, found = self.arrivals, list(self.arrivals[:count])
        period = once[-1].at + (1 / self.rate if len(once) > 1 else 0.0)
        names = 1 + max((max(one.blocks, default=0) for one in once), default=0)
        while len(found) < count:
            turn = len(found) // len(once)
            for one in once[: count - len(found)]:
                found.append(one._replace(at=one.at + turn * period, blocks=[name + turn * names for name in one.blocks]))
        about = {count < len(once): f"{count} of {self.about}", count > len(once): f"{count} from {self.about}, repeated"}
        return replace(self, arrivals=found, about=about.get(True, self.about))

    def at_rate(self, rate: float) -> Trace:
        """The same requests in the same order, played so that `rate` of them come a second."""
        factor = self.rate / rate if self.arrivals[-1].at else 0.0
        return replace(self, arrivals=[one._replace(at=one.at * factor) for one in self.arrivals])

    def poisson(self, seed: int) -> Trace:
        """The same requests with gaps that are drawn independently of each other."""
        times = _times(len(self.arrivals), 1.0, 1.0, random.Random(f"arrivals {seed}"))
        drawn = [one._replace(at=at) for one, at in zip(self.arrivals, times, strict=True)]
        return replace(self, arrivals=drawn, about=f"{self.about}, Poisson").at_rate(self.rate)


# ---- drawn


@dataclass(frozen=True)
class Poisson(Options):
    """rate: requests a second; prompt, output: mean tokens; spread: the standard deviation of the logarithm of lengths, 0 for equal ones;
    cv: the coefficient of variation of the gaps, 1 for a Poisson process, more for bursts (gamma); shared: tokens at the start of a prompt
    that are those of its group; groups: how many groups; requests: how many come."""

    rate: float = number(1.0, gt=0)
    prompt: int = number(1024, ge=1)
    output: int = number(128, ge=1)
    spread: float = number(0.0, ge=0, le=3)
    cv: float = number(1.0, gt=0, le=100)
    shared: int = number(0, ge=0)
    groups: int = number(1, ge=1)
    requests: int = number(1000, ge=1, le=10_000_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shared > self.prompt:
            raise InvalidInput(f"poisson:shared={self.shared}: at most prompt = {self.prompt} is allowed")

    def trace(self, seed: int) -> Trace:
        draw = random.Random(f"lengths {seed}")
        times = _times(self.requests, self.rate, self.cv, random.Random(f"arrivals {seed}"))
        found = [Arrival(at, self._length(self.prompt, draw), self._length(self.output, draw), *self._blocks(draw)) for at in times]
        return Trace(found, f"{self.requests} requests, drawn")

    def _length(self, mean: int, draw: random.Random) -> int:
        """At least 1; rounded so that the mean of many is that of the distribution."""
        if not self.spread:
            return mean
        value = mean * exp(draw.gauss(-(self.spread**2) / 2, self.spread))
        return max(1, int(value + draw.random()))

    def _blocks(self, draw: random.Random) -> tuple[Seq[int], int]:
        return ([draw.randrange(self.groups)], self.shared) if self.shared else ((), SIZE)


def _times(count: int, rate: float, cv: float, draw: random.Random) -> list[float]:
    """Times from 0 on with gamma-distributed gaps, stretched so that the mean gap is exactly 1 / rate."""
    shape = 1 / cv**2
    times = list(accumulate((draw.gammavariate(shape, 1.0) for _ in range(count - 1)), initial=0.0))
    factor = (count - 1) / rate / times[-1] if times[-1] else 0.0
    return [time * factor for time in times]


# ---- files


def read(text: str, seed: int = 0) -> Trace:
    """The trace of "poisson:option=value,...", of a .csv file or of a .jsonl file, either also with .gz. Raises InvalidInput."""
    if text == "poisson" or text.startswith("poisson:"):
        made: Poisson = registry.build(Poisson, text)
        return made.trace(seed)
    path = Path(text)
    kinds = [suffix for suffix in path.suffixes if suffix != ".gz"][-1:]
    if kinds == [".jsonl"]:
        found = _mooncake(path)
    elif kinds == [".csv"] and path.suffix == ".csv":
        found = [Arrival(*row) for row in read_trace(path)]
    else:
        raise InvalidInput(f"trace = {shown(text)}: a .csv or .jsonl file, or poisson:option=value,... is needed")
    return Trace(found, f"{len(found)} requests of {path.name}")


def _mooncake(path: Path) -> list[Arrival]:
    """JSON lines with timestamp (ms), input_length, output_length, and hash_ids of each SIZE tokens."""
    found = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    found.append(_arrival(text, f"trace = {path}, line {line}"))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidInput(f"trace = {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise InvalidInput(f"trace = {path}: has no rows")
    found.sort(key=lambda one: one.at)
    return [one._replace(at=one.at - found[0].at) for one in found]


def _arrival(text: str, where: str) -> Arrival:
    try:
        row: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidInput(f"{where}: is not JSON") from None
    if not isinstance(row, dict):
        raise InvalidInput(f"{where}: an object is needed")
    for name, kinds in FIELDS.items():
        least = 0 if name == "timestamp" else 1
        if type(row.get(name)) not in kinds or not least <= row[name] < inf:
            raise InvalidInput(f"{where}: {name} = {shown(row.get(name))}: a number of {least} or more is needed")
    names = row.get("hash_ids", [])
    if not isinstance(names, list) or any(type(name) is not int or not 0 <= name < VOCAB // 2 for name in names):
        raise InvalidInput(f"{where}: hash_ids = {shown(names)}: a list of whole numbers of 0 or more is needed")
    if len(names) > ceil(row["input_length"] / SIZE):
        raise InvalidInput(f"{where}: hash_ids has {len(names)} entries for {row['input_length']} tokens in blocks of {SIZE}")
    return Arrival(row["timestamp"] / 1000, row["input_length"], row["output_length"], names)
