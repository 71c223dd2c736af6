"""What `tune` found: a table, the reasons, a YAML file for --config, and a page."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from datetime import date
from typing import Any

from redraft.bench import charts
from redraft.bench.compare import BASELINE
from redraft.bench.page import Section, whole
from redraft.bench.report import heading, notes
from redraft.bench.results import Row, rows
from redraft.bench.svg import spread
from redraft.bench.tune import Candidate, Tuned, TuneOptions, winner
from redraft.columns import fold

COLUMNS = 80
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16)
SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32)  # rows of a step in the table
HEAD = ("drafter", "rows", "tokens", "cost", "expected", "tokens/s", "speed-up", "min-max")
WIDTHS = (24, 5, 7, 5, 9, 9, 9, 10)  # of columns, 78 in total: in the file they follow a mark


class Advice:
    """The winner and why. given: the engine's options, which the file repeats."""

    def __init__(self, tuned: Tuned, options: TuneOptions, model: str, given: Mapping[str, Any]) -> None:
        self.tuned, self.options, self.model, self.given = tuned, options, model, given
        self.rows = rows(tuned.comparison)
        self.overall = [row for row in self.rows if row.category is None]
        self.best = winner(self.overall, tuned.comparison.rounds)

    @property
    def candidate(self) -> Candidate | None:
        """The winner; None for the plain loop."""
        return None if self.best is None else self._candidate(self.best)

    def _candidate(self, row: Row) -> Candidate:
        return next(one for one in self.tuned.candidates if one.name == row.method)

    # ---- why

    def why(self) -> list[str]:
        drafted = [row for row in self.overall if row.speedup is not None]
        if self.best is not None:
            close = [row.method for row in drafted if row is not self.best and (row.speedup_high or 0) >= (self.best.speedup_low or 0)]
            lines = [f"{self.best.method} is the fastest, in every round faster than the plain loop: {_ratio(self.best)}"]
            lines.append(self._reason(self._candidate(self.best)))
            return lines + ([f"within its spread: {', '.join(close)}"] if close else [])
        if self.tuned.comparison.rounds < 2:
            return ["draft: none, because the measurement was stopped before there was a spread"]
        lines = ["draft: none, because no drafter was faster than the plain loop in every round"]
        if drafted:
            nearest = max(drafted, key=lambda row: row.speedup or 0.0)
            lines += [f"the nearest, {nearest.method}: {_ratio(nearest)}", self._reason(self._candidate(nearest))]
        return lines

    @staticmethod
    def _reason(one: Candidate) -> str:
        return (
            f"it keeps {one.tokens - 1:.2f} of {one.drafted:.1f} drafted tokens a step, so a step gives {one.tokens:.2f} tokens, not 1; "
            f"it takes {one.cost:.2f} times as long as a plain one, {one.drafting:.2f} of it for drafting: {one.speedup:.2f}x expected"
        )

    # ---- the table

    def lines(self) -> list[str]:
        """Fits 80 columns, unless the name of a method does not fit."""
        plain, *drafted = self.overall
        text = [_cells(HEAD, WIDTHS)]
        figures: list[tuple[Row, Candidate | None]] = [(plain, None), *((row, self._candidate(row)) for row in drafted)]
        for row, one in figures:
            speed = f"{row.tokens_per_second:.1f}"
            if one is None:
                digits = 1 if row.tokens_per_second_high < 100 else 0
                among = f"{row.tokens_per_second_low:.{digits}f}-{row.tokens_per_second_high:.{digits}f}"
                cells = [row.method, "0.0", "1.00", "1.00", "", speed, "1", among]
            else:
                ratio = ("-", "") if row.speedup is None else (f"{row.speedup:.2f}x", f"{row.speedup_low:.2f}-{row.speedup_high:.2f}")
                cells = [row.method, f"{one.drafted:.1f}", f"{one.tokens:.2f}", f"{one.cost:.2f}", self._expected(one), speed, *ratio]
            text.append(_cells(cells, WIDTHS))
        times = {point.x: point for point in self.tuned.curve}
        sizes = [size for size in SIZES if size in times]
        text += ["", _cells(["rows of a step", *map(str, sizes)], (18, *[6] * len(sizes)))]
        text.append(_cells(["ms", *(spread(times[size].y) for size in sizes)], (18, *[6] * len(sizes))))
        text += ["", _cells(["kept at depth", *map(str, DEPTHS)], (25, *[6] * len(DEPTHS)))]
        for draft, profile in self.tuned.profiles.items():
            shares = profile.by_depth
            shown = [f"{shares[depth - 1]:.0%}" if depth <= len(shares) else "0" for depth in DEPTHS]
            text.append(_cells([draft, *shown], (25, *[6] * len(DEPTHS))))
        return text

    def notes(self) -> list[str]:
        """Notes below the table, one on each line."""
        groups, batch = self.tuned.comparison.groups, self.options.batch
        small = sum(len(group.prompts) < batch for group in groups)
        few = f"{small} of {len(groups)} prompt groups have fewer than {batch} prompts: give {2 * batch} prompts or more of each category"
        return [
            *([few] if small else []),
            "rows: drafted for a text in a step on average; tokens: of a text in a step; cost: of such a step, in plain steps; these and "
            "the expected tokens/s are from one pass of each drafter and the times of steps, relative to the plain loop",
            "tokens/s, speed-up: measured, medians of the rounds; min-max: of the speed-up, for none of tokens/s",
            f"kept at depth: share of steps that kept so many drafts or more; rows of a step: {self.setting}",
            *self.dropped(),
            *notes(self.tuned.comparison, self.options, self.rows),
        ]

    def dropped(self) -> list[str]:
        """The drafters that were not measured, in a line with the reason; nothing if there are none."""
        left = set(self.tuned.profiles) - {one.draft for one in self.tuned.candidates}
        best: dict[str, float] = {}
        for one in self.tuned.expectations:
            if one.draft in left:
                best[one.draft] = max(best.get(one.draft, 0.0), one.speedup)
        named = [f"{draft} {speedup:.2f}x" for draft, speedup in sorted(best.items(), key=lambda pair: -pair[1])]
        named += [f"{draft} (no step)" for draft in sorted(left - best.keys())]
        return [f"not measured, below the best {self.options.best} by expectation: {', '.join(named)}"] if named else []

    @property
    def setting(self) -> str:
        """What the times of steps hold for."""
        texts = max(map(len, self.tuned.plain.batches))
        return f"{texts} text{'s' * (texts > 1)} with {self.tuned.plain.context} cached tokens{' each' * (texts > 1)}"

    def text(self) -> list[str]:
        """Heading, reasons, table and notes as lines."""
        head = heading(self.tuned.comparison, self.options)
        parts = [line for one in head for line in fold(one, COLUMNS)]
        parts += ["", *(line for one in self.why() for line in fold(one, COLUMNS)), "", *self.lines(), ""]
        return parts + [line for one in self.notes() for line in fold(f"- {one}", COLUMNS)]

    # ---- files

    def yaml(self) -> str:
        """A file for --config, with the measured figures as comments."""
        import yaml

        head = [f"Written by redraft tune, {date.today():%d %B %Y}.", *heading(self.tuned.comparison, self.options)]
        comments = [line for one in [*head, *self.why()] for line in fold(one, COLUMNS - 2)] + ["", *self.lines()]
        one = self.candidate
        settings = {"model": self.model, **self.given, "draft": BASELINE if one is None else one.draft}
        if one is not None and one.rows is not None:
            settings["draft_rows"] = one.rows
        values = {name.replace("_", "-"): list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        shown = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000)
        return "".join(f"# {_printable(line)}".rstrip() + "\n" for line in comments) + "\n" + str(shown)

    def page(self) -> str:
        tuned = self.tuned
        cells = []
        for one in tuned.expectations:
            figures = [f"{value:.2f}" for value in (one.drafted, one.tokens, one.cost, one.drafting)]
            cells.append([one.draft, str(one.rows or "its own"), *figures, self._expected(one), self._measured(one)])
        head = ["drafter", "rows", "nodes a step", "tokens a step", "cost", "of it drafting", "expected tokens/s", "measured"]
        text = "From acceptance and cost. Costs are in plain steps. The best few were measured."
        expected = Section("Expected speed", text, "", head, cells)
        sections = [
            *charts.speeds(self.rows),
            charts.acceptance({draft: profile.by_depth for draft, profile in tuned.profiles.items()}),
            charts.cost({self.model: tuned.curve}, f"A forward pass, {self.setting}, measured; lines go from the fastest to the slowest."),
            expected,
        ]
        facts = [*heading(tuned.comparison, self.options), *self.why()]
        return whole(f"Drafter tuned: {self.model}", facts, sections, self.notes(), code=self.yaml())

    def _expected(self, one: Candidate) -> str:
        return f"{one.speedup * self.overall[0].tokens_per_second:.1f}"

    def _measured(self, one: Candidate) -> str:
        row = next((row for row in self.overall if row.method == one.name), None)
        return "" if row is None else f"{row.tokens_per_second:.1f} ({row.tokens_per_second_low:.1f}-{row.tokens_per_second_high:.1f})"


def _ratio(row: Row) -> str:
    return f"{row.speedup:.2f}x ({row.speedup_low:.2f}-{row.speedup_high:.2f})"


def _cells(values: Seq[str], widths: Seq[int]) -> str:
    first, *rest = zip(values, widths, strict=True)
    return (f"{first[0]:<{first[1]}}" + "".join(f" {value:>{width - 1}}" for value, width in rest)).rstrip()


def _printable(line: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in line)
