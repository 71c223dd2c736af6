"""A claim of a paper, the miniature that tests it, and the verdict, which follows from the numbers of the samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from redraft.bench.cache import bootstrap
from redraft.engine.curves import Interval

RESULTS = Path(__file__).parent / "results.json"
SERVING = Path(__file__).resolve().parents[2] / "docs" / "claims-serving.md"
FEWEST = 5  # samples that decide: of fewer, all are on one side of the border too often by chance
CONFIRMED, REFUTED, UNSEEN = "confirmed", "refuted", "cannot be seen here"
HEAD = ("| name | claim | in small | verdict | number (95 % interval) | samples |", "|---|---|---|---|---|---|")


class Found(NamedTuple):
    """values: one number a sample; notes: other numbers of the same run, a line each."""

    values: Seq[float]
    notes: Seq[str] = ()


@dataclass(frozen=True)
class Claim:
    """name: on the command line; methods: "seam=name" of those that it is about; says: what the paper claims; small: what runs here;
    value: what the number of a sample is; border: the claim holds above it, or below it if `below`; run: called with a Lab."""

    name: str
    methods: tuple[str, ...]
    says: str
    small: str
    value: str
    run: Callable[[Any], Found]
    border: float = 0.0
    below: bool = False

    @property
    def expected(self) -> str:
        return f"{'below' if self.below else 'above'} {self.border:g}"

    def verdict(self, found: Interval, samples: int) -> str:
        """Decided only where the whole interval is on one side of the border, by FEWEST samples or more."""
        above, under = found.low > self.border, found.high < self.border
        return UNSEEN if samples < FEWEST or not (above or under) else CONFIRMED if under == self.below else REFUTED

    def answers(self, name: str) -> bool:
        """Whether this claim is meant by a claim's name, a method's name or seam=name."""
        return name == self.name or any(name in (method, method.partition("=")[2]) for method in self.methods)


@dataclass(frozen=True)
class Result:
    """What a run of a claim gave. command: the one that gives it again; seconds: of a processor."""

    name: str
    mean: float
    low: float
    high: float
    samples: int
    seconds: float
    command: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, claim: Claim, found: Found, seconds: float, command: str) -> Result:
        """ValueError for fewer than two samples, or one that is not a number."""
        values = np.array(found.values, np.float64)
        if len(values) < 2 or not np.isfinite(values).all():
            raise ValueError(f"{claim.name}: {len(values)} samples: {values}")
        return cls(claim.name, *bootstrap(values), len(values), round(seconds, 1), command, tuple(found.notes))

    @property
    def interval(self) -> Interval:
        return Interval(self.mean, self.low, self.high)

    def __str__(self) -> str:
        return f"{number(self.mean)} ({number(self.low)} to {number(self.high)})"


def number(value: float) -> str:
    """Three digits; 0 if it is too small for them to matter."""
    return f"{value:.3g}" if abs(value) >= 1e-9 else "0"


def read(path: Path = RESULTS) -> dict[str, Result]:
    """The results of a file by claim."""
    if not path.exists():
        return {}
    return {one["name"]: Result(**{**one, "notes": tuple(one["notes"])}) for one in json.loads(path.read_text(encoding="utf-8"))}


def write(results: Iterable[Result], path: Path = RESULTS) -> None:
    text = json.dumps([asdict(one) for one in results], indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def rows(claims: Seq[Claim], results: dict[str, Result]) -> list[str]:
    """The table of docs/claims.md: a line for each claim, with what was found."""
    lines = list(HEAD)
    for claim in claims:
        found = results.get(claim.name)
        if found is None:
            lines.append(f"| {claim.name} | {claim.says} | {claim.small} | not run | | |")
            continue
        figure, verdict = f"{found}; {claim.expected} expected: {claim.value}", claim.verdict(found.interval, found.samples)
        lines.append(f"| {claim.name} | {claim.says} | {claim.small} | **{verdict}** | {figure} | {found.samples} |")
    return lines


def serving(text: str) -> list[str]:
    """Lines of the same table from that of the other page: its claims with their verdicts."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and len(cells) == 4 and cells[0] not in ("", "claim"):
            found.append(f"| serving | {cells[0]} | {cells[1]} | {cells[2]} | [claims-serving.md](claims-serving.md) | |")
    return found


def table(claims: Seq[Claim], results: dict[str, Result]) -> list[str]:
    """The whole table: every claim of a method, then those of serving."""
    return rows(claims, results) + serving(SERVING.read_text(encoding="utf-8"))
