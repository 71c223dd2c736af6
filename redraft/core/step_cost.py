"""The seconds of a whole engine step without drafts, host work included, as they were measured once on a machine.

    seconds = line(rows) + text * texts + cell * cells + token * read

`line` runs between knots and never falls. The last two terms are attention: `cells` are pairs of a row and a token that it sees, `read`
are tokens that at least one row of their text sees. core/cost.py is the same idea for drafters: the relative time of a forward pass,
which every step corrects. Here times are absolute and fixed, and a batch may mix prompts and decoding texts.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from redraft.core.batch import Batch
from redraft.core.tree import F64
from redraft.errors import InvalidInput, shown

FORMAT = "redraft step cost 1"
KNOTS = (*range(1, 17), 20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)  # kernels run rows in tiles
TERMS = ("text", "cell", "token")


class Size(NamedTuple):
    """What the time of a step depends on. rows: of its batch; texts: sequences in it; cells: the sum over them of rows * (cached tokens +
    (rows + 1) / 2); read: the sum over them of cached tokens and rows."""

    rows: int
    texts: int
    cells: float
    read: float

    @classmethod
    def of(cls, batch: Batch) -> Size:
        """Of a batch without drafts."""
        rows, cached = np.diff(batch.starts), batch.positions[batch.starts[:-1]]
        return cls(len(batch.tokens), len(rows), float(rows @ (cached + (rows + 1) / 2)), float((cached + rows).sum()))


class Step(NamedTuple):
    """A step that was measured."""

    size: Size
    seconds: float


@dataclass(frozen=True)
class StepCost:
    """rows, times: the knots of `line` and its seconds there; text, cell, token: seconds of each text, cell and token that is read; about:
    what was measured, which nothing here depends on."""

    rows: tuple[int, ...]
    times: tuple[float, ...]
    text: float = 0.0
    cell: float = 0.0
    token: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """InvalidInput names a field, its value and what is allowed."""
        if not self.rows or any(type(n) is not int or n < 1 for n in self.rows) or list(self.rows) != sorted(set(self.rows)):
            raise InvalidInput(f"rows = {shown(self.rows)}: whole numbers from 1, each larger than the one before, are needed")
        if len(self.times) != len(self.rows):
            raise InvalidInput(f"times = {shown(self.times)}: {len(self.rows)} numbers are needed, one for each of rows")
        if not all(map(_number, self.times)) or not self.times[0] > 0 or list(self.times) != sorted(self.times):
            raise InvalidInput(f"times = {shown(self.times)}: seconds above 0 are needed, none less than the one before")
        for name in TERMS:
            if not _number(value := getattr(self, name)) or value < 0:
                raise InvalidInput(f"{name} = {shown(value)}: seconds, 0 or more, are needed")

    def seconds(self, rows: int, texts: int, cells: float, read: float) -> float:
        """Of a step of this Size. Beyond the last knot `line` goes on as before it."""
        return self._line(rows) + self.text * texts + self.cell * cells + self.token * read

    def _line(self, rows: int) -> float:
        last = len(self.rows) - 1
        i = min(max(bisect_right(self.rows, rows) - 1, 0), max(last - 1, 0))
        if i == last or rows <= self.rows[0]:
            return self.times[0]
        low, high = self.rows[i], self.rows[i + 1]
        return self.times[i] + (self.times[i + 1] - self.times[i]) * (rows - low) / (high - low)

    # ---- from measurements

    @classmethod
    def fit(cls, steps: Seq[Step], about: Mapping[str, Any] | None = None) -> StepCost:
        """The least squares of relative errors, with no negative term. A clock that stood still says nothing."""
        steps = [step for step in steps if step.seconds > 0]
        if not steps:
            raise InvalidInput("steps = []: at least one measured step is needed")
        rows, texts, cells, read = np.array([step.size for step in steps], np.float64).T
        knots, seconds = _knots(rows), np.array([step.seconds for step in steps])
        rises = [np.clip((rows - low) / (high - low), 0, None if high == knots[-1] else 1) for low, high in pairwise(knots)]
        terms = np.array([np.ones_like(rows), *rises, texts, cells, read]) / seconds
        found = positive_least_squares(terms.T, np.ones_like(rows))
        times = np.maximum(np.cumsum(found[: len(knots)]), 1e-9)  # above 0 even where the other terms explain everything
        text, cell, token = found[len(knots) :].tolist()
        return cls(knots, tuple(times.tolist()), text, cell, token, about or {})

    def errors(self, steps: Seq[Step]) -> F64:
        """f64[steps]: predicted over measured seconds, less 1."""
        return np.array([self.seconds(*step.size) / step.seconds - 1 for step in steps])

    # ---- files

    def document(self) -> dict[str, Any]:
        """For a JSON file, which `read` reads."""
        terms = {name: getattr(self, name) for name in TERMS}
        return {"format": FORMAT, "about": dict(self.about), "rows": list(self.rows), "times": list(self.times), **terms}

    @classmethod
    def read(cls, path: Path) -> StepCost:
        """InvalidInput names the file, and the field that is wrong."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else "is not JSON"
            raise InvalidInput(f"cost = {path}: {why}; `redraft bench profile` writes such a file") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            found = value.get("format") if isinstance(value, dict) else value
            raise InvalidInput(f"cost = {path}: format = {shown(found)}: {FORMAT!r} is needed; `redraft bench profile` writes such a file")
        for name, kind, needed in (("rows", list, "a list"), ("times", list, "a list"), ("about", dict, "an object")):
            if not isinstance(value.get(name), kind):
                raise InvalidInput(f"cost = {path}: {name} = {shown(value.get(name))}: {needed} is needed")
        try:
            terms: list[Any] = [value.get(name) for name in TERMS]
            text, cell, token = terms
            return cls(tuple(value["rows"]), tuple(value["times"]), text, cell, token, value["about"])
        except InvalidInput as error:
            raise InvalidInput(f"cost = {path}: {error}") from None


def _number(value: Any) -> bool:
    return type(value) in (int, float) and -math.inf < value < math.inf


def _knots(rows: F64) -> tuple[int, ...]:
    """Knots that the measured numbers of rows support: the ends, and of KNOTS those that were measured."""
    known = set(rows.astype(int).tolist())
    return tuple(sorted({min(known), max(known), *(known & set(KNOTS))}))


def positive_least_squares(terms: F64, wanted: F64) -> F64:
    """f64[n]: x of 0 or more with the least |terms x - wanted|. terms: f64[m, n]. C. L. Lawson and R. J. Hanson, Solving Least Squares
    Problems, 1974, chapter 23."""
    scale = np.maximum(np.linalg.norm(terms, axis=0), 1e-300)
    terms = terms / scale
    count = terms.shape[1]
    x, free = np.zeros(count), np.zeros(count, bool)
    for _ in range(10 * count):
        slope = np.where(free, -np.inf, terms.T @ (wanted - terms @ x))
        if slope.max() <= 1e-10 * np.linalg.norm(wanted):
            break
        free[slope.argmax()] = True
        while True:
            trial = np.zeros(count)
            trial[free] = np.linalg.lstsq(terms[:, free], wanted, rcond=None)[0]
            if (low := free & (trial < 0)).any():
                step = (x[low] / (x[low] - trial[low])).min()
                x = x + step * (trial - x)
                free &= x > 1e-14
                x[~free] = 0.0
            else:
                x = trial
                break
    found: F64 = x / scale
    return found
