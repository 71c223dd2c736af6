"""The time of a step against its rows, cached tokens and texts: what a drafted node costs on this machine with this model.

    time = unit * (shape[rows] + text * texts + token * cached + cell * cached / texts * rows)

`shape` is relative to one row. It starts from a prior, is replaced by a calibration, and every step corrects it a little. The last two
terms are attention. Before a calibration they follow from the model and from what `shape` says about the machine: reading one row's
weights gives its bandwidth, and many rows give its arithmetic. A simulator can use the same object with a shape from a file.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

ROWS = 128
"""The largest number of rows with a time of its own. More rows cost as the last ones do."""
KNOTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
NEAREST = [min(range(len(KNOTS)), key=lambda i: abs(KNOTS[i] - rows)) for rows in range(ROWS + 1)]  # knot of each number of rows
UNIT_RATE = 0.1  # weight of a step in the mean time of one row
SHAPE_RATE = 0.02  # weight of a step in the shape, after the first ones
MEASURED = 8  # steps that a calibration counts as
TRUSTED = 25  # steps after which a knot has the rate SHAPE_RATE
TEXT = 0.02  # time of a text beside its rows, in that of one row
OUTLIER = 1.5  # a step counts at most as this much slower or faster than expected: other programs disturb single steps

FLAT = (1.0, 1.0, 1.0, 1.01, 1.02, 1.02, 1.03, 1.04, 1.05, 1.06, 1.1, 1.12, 1.15, 1.2, 1.35, 1.5, 2.0, 2.6)
STEEP = (1.0, 1.03, 1.08, 1.15, 1.3, 1.45, 1.5, 1.57, 1.75, 1.95, 2.4, 2.9, 3.4, 4.4, 6.5, 8.6, 12.8, 17.0)
"""Priors at KNOTS: FLAT for machines with matrix units (GPUs, AMX), STEEP for CPUs without them (SmolLM2-135M, two cores, AVX-512)."""


@dataclass(frozen=True)
class Sizes:
    """What attention costs depends on. weights: bytes that one row reads; flops: of one row in the linear layers; kv: bytes of keys and
    values of a cached token; cell: flops of one row for a cached token."""

    weights: float = 1.0
    flops: float = 1.0
    kv: float = 0.0
    cell: float = 0.0


ONE = Sizes()


class CostModel:
    """shape: relative times at KNOTS; sizes: of the model; path: the file that keeps it, None for none. `calibrated`: whether the shape
    was measured on this machine; rounds: times of steps, (rows, cached tokens) -> seconds, measured one after another."""

    def __init__(self, shape: Seq[float] = STEEP, sizes: Sizes = ONE, path: Path | None = None) -> None:
        self.sizes, self.path = sizes, path
        self.unit: float | None = None  # seconds of one row, None before the first step
        self.calibrated = False
        self.rounds: list[dict[tuple[int, int], float]] = []
        self.text = TEXT
        self._seen = [0] * len(KNOTS)
        self._set(shape)
        if path is not None:
            self._load(path)

    def _set(self, shape: Seq[float]) -> None:
        self.shape = [value / shape[0] for value in shape]
        self.times = array("d", [0.0] * (ROWS + 1))  # of each number of rows
        for i in range(len(KNOTS) - 1):
            self._between(i)
        slope = (self.shape[-1] - self.shape[-5]) / (KNOTS[-1] - KNOTS[-5])  # of a row, where arithmetic limits
        self.more = max(slope, 1e-6)
        self.token = self.sizes.kv / self.sizes.weights  # in the time of one row, whose weights take 1
        self.cell = self.sizes.cell / self.sizes.flops * self.more

    def _between(self, i: int) -> None:
        """Times from knot i to the next one, on a line."""
        low, high, first = KNOTS[i], KNOTS[i + 1], self.shape[i]
        slope = (self.shape[i + 1] - first) / (high - low)
        for rows in range(low, high + 1):
            self.times[rows] = first + slope * (rows - low)

    # ---- what a step takes, in the time of one row without cache

    def line(self, cached: int, texts: int) -> tuple[float, float]:
        """What `cached` tokens of `texts` texts add to a step, and to each of its rows."""
        return self.token * cached + self.text * texts, self.cell * cached / max(texts, 1)

    def relative(self, rows: int) -> float:
        return self.times[rows] if rows <= ROWS else self.times[ROWS] + self.more * (rows - ROWS)

    def seconds(self, rows: int, cached: int = 0, texts: int = 1) -> float | None:
        """None before the first step was seen."""
        fixed, each = self.line(cached, texts)
        return None if self.unit is None else self.unit * (self.relative(rows) + fixed + each * rows)

    # ---- where it comes from

    def observe(self, rows: int, cached: int, texts: int, seconds: float) -> None:
        """A step took so long. A clock that stood still says nothing."""
        if seconds <= 0:
            return
        fixed, each = self.line(cached, texts)
        expected = self.relative(rows) + fixed + each * rows
        if self.unit is None:
            self.unit = seconds / expected
        ratio = min(max(seconds / (self.unit * expected), 1 / OUTLIER), OUTLIER)
        self.unit *= 1 + UNIT_RATE * (ratio - 1)
        if rows > ROWS:
            return
        i = NEAREST[rows]
        self._seen[i] = min(self._seen[i] + 1, TRUSTED)
        rate = max(SHAPE_RATE, 0.5 / (self._seen[i] + 1))
        self.shape[i] *= 1 + rate * (ratio - 1)
        for place in (i - 1, i):
            if 0 <= place < len(KNOTS) - 1:
                self._between(place)

    def add_round(self, times: dict[tuple[int, int], float]) -> None:
        """Calibrates with the medians of all rounds, and saves them, so that a later process goes on with the next round. Medians are of
        ratios within a round: other programs disturb all sizes alike."""
        self.rounds.append(times)
        own = [one for one in self.rounds if times.keys() <= one.keys()]
        unit = median(one[1, 0] for one in own)
        self.calibrate({size: unit * median(one[size] / one[1, 0] for one in own) for size in times})
        self.save()

    def calibrate(self, times: dict[tuple[int, int], float]) -> None:
        """Replaces what follows from the prior by measured times: (rows, cached tokens) -> seconds. One row without cached tokens is
        needed. Other knots keep their prior, times the factors of the nearest measured ones. More rows never take less time. Attention is
        measured by two sizes with equally many cached tokens, or stays as it is."""
        one = times.get((1, 0), 0.0)
        if one <= 0 or min(times.values()) <= 0:
            raise ValueError(f"times of one row and more are needed: {times}")
        known = sorted(rows for rows, cached in times if not cached)
        factors = {rows: times[rows, 0] / one / self.relative(rows) for rows in known}
        shape = []
        for knot in KNOTS:
            below, above = max(r for r in known if r <= knot), min((r for r in known if r >= knot), default=known[-1])
            share = 0.0 if above <= below else (knot - below) / (above - below)
            shape.append(self.relative(knot) * (factors[below] ** (1 - share) * factors[above] ** share))
        self._set(list(accumulate(shape, max)))
        longer = sorted((rows, cached) for rows, cached in times if cached)
        if len(longer) == 2 and longer[0][1] == longer[1][1]:
            (few, cached), (many, _) = longer
            less, more = (max(0.0, times[rows, cached] / one - self.relative(rows)) / cached for rows in (few, many))
            self.cell = max(0.0, more - less) / (many - few)
            self.token = max(0.0, less - few * self.cell)
        self._seen = [MEASURED] * len(KNOTS)
        self.unit, self.calibrated = self.unit or one, True

    # ---- kept between processes

    def save(self) -> None:
        """Writes it, or does nothing if the place cannot be written: the next process then measures again."""
        if self.path is None:
            return
        value: dict[str, Any] = {"rows": KNOTS, "shape": self.shape, "unit": self.unit, "token": self.token, "cell": self.cell}
        value["rounds"] = [[[*size, seconds] for size, seconds in one.items()] for one in self.rounds]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(value), encoding="utf-8")
            part.replace(self.path)
        except OSError:
            return

    def _load(self, path: Path) -> None:
        """A missing or damaged file leaves the prior."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            shape, unit = [float(x) for x in value["shape"]], float(value["unit"])
            token, cell = float(value["token"]), float(value["cell"])
            if value["rows"] != list(KNOTS) or len(shape) != len(KNOTS) or not all(0 < x < math.inf for x in (unit, *shape)):
                return
            if not (0 <= token < 1 and 0 <= cell < 1):
                return
            rounds = [{(int(rows), int(cached)): float(seconds) for rows, cached, seconds in one} for one in value["rounds"]]
            if not all((1, 0) in one and all(0 < seconds < math.inf for seconds in one.values()) for one in rounds):
                return
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return
        self._set(shape)
        self._seen = [MEASURED] * len(KNOTS)
        self.unit, self.token, self.cell, self.rounds, self.calibrated = unit, token, cell, rounds, True
