"""Plots as inline SVG: lines over x, and dots by group, both with their spread. Colours are variables of the page; a tooltip is a
<title>, which needs no script."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 320
LETTER, LINE = 6.6, 18  # width of a letter and height of a line of text
COLOURS = 8  # that the page defines; further lines repeat them with other dashes
DASHES = ("", "6 3", "2 3", "8 3 2 3")
LONGEST = 34  # letters of a name that are shown; the tooltip has all

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1f24; --soft: #5b6470; --grid: #e3e6ea;
  --c0: #0b69a3; --c1: #b8500f; --c2: #1d7f4e; --c3: #a3338a; --c4: #8a6a00; --c5: #5b4fc7; --c6: #b3263b; --c7: #3f7d86 }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e6e8eb; --soft: #a0a8b3; --grid: #31363d;
  --c0: #6cb6eb; --c1: #f0985c; --c2: #62c48f; --c3: #e08fcb; --c4: #d6b64c; --c5: #a79ff5; --c6: #f2848f; --c7: #7cc3cc } }
svg { display: block; width: 100%; max-width: 760px; height: auto; font: 12px system-ui, sans-serif; fill: var(--ink) }
svg .soft { fill: var(--soft) } svg .grid { stroke: var(--grid) } svg .plain { stroke: var(--soft); stroke-dasharray: 3 3 }
svg .line { fill: none; stroke-width: 2 } svg .range { stroke-width: 1.5 }
"""


@dataclass(frozen=True)
class Point:
    """y at x, and the smallest and largest y that were measured."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Dot:
    """A value with a name, and the smallest and largest that were measured."""

    name: str
    value: float
    low: float
    high: float


def lines(series: Mapping[str, Seq[Point]], x: str, y: str, *, percent: bool = False) -> str:
    """A line for each name. x, y: labels of the axes, with units; percent: y are shares from 0 to 1."""
    points = [point for line in series.values() for point in line]
    across = ticks(min(p.x for p in points), max(p.x for p in points), whole=True)
    up = [0, 0.25, 0.5, 0.75, 1] if percent else ticks(0, max(p.high for p in points))
    names = max(map(len, series)) if len(series) > 1 else 0
    left, right, top = 58, 24 + (min(names, LONGEST) + 4) * LETTER * (len(series) > 1), 24
    height = max(HEIGHT, top + 50 + LINE * len(series))
    wide, high = WIDTH - left - right, height - top - 46

    def at(px: float, py: float) -> tuple[float, float]:
        return left + wide * (px - across[0]) / (across[-1] - across[0]), top + high * (1 - py / up[-1])

    parts = [_text(8, 14, y, "soft"), _text(left + wide / 2, height - 6, x, "soft", "middle")]
    for tick in up:
        _, py = at(across[0], tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{left + wide:.1f}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(_text(left - 8, py + 4, f"{tick:.0%}" if percent else f"{tick:g}", "soft", "end"))
    parts += [_text(at(tick, 0)[0], top + high + 18, f"{tick:g}", "soft", "middle") for tick in across]
    for i, (name, line) in enumerate(series.items()):
        colour, dash = f"var(--c{i % COLOURS})", DASHES[i // COLOURS % len(DASHES)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(p.x, p.y) for p in line))
        drawn = [f'<polyline class="line" stroke="{colour}" stroke-dasharray="{dash}" points="{path}"/>']
        for p in line:
            (px, py), (_, low), (_, most) = at(p.x, p.y), at(p.x, p.low), at(p.x, p.high)
            shown = f"{p.y:.1%}" if percent else spread(p.y, p.low, p.high)
            drawn.append(f'<line class="range" stroke="{colour}" x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{most:.1f}"/>')
            drawn.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}">{_title(f"{name}, {x} {p.x:g}: {shown}")}</circle>')
        if len(series) > 1:
            px, py = left + wide + 14, top + 6 + LINE * i
            drawn.append(f'<line class="line" stroke="{colour}" stroke-dasharray="{dash}" x1="{px}" x2="{px + 20}" y1="{py}" y2="{py}"/>')
            drawn.append(_text(px + 26, py + 4, name))
        parts.append(f"<g>{''.join(drawn)}</g>")
    return _svg(height, parts, f"{y} against {x}")


def dots(groups: Mapping[str, Seq[Dot]], x: str) -> str:
    """A row for each dot under the name of its group. The first dot of a group is a dashed line through the group. x: label, with unit."""
    every = [dot for group in groups.values() for dot in group]
    across = ticks(0, max(dot.high for dot in every))
    left = 16 + min(LONGEST, max(len(dot.name) for dot in every)) * LETTER
    wide = WIDTH - left - 20

    def at(value: float) -> float:
        return left + wide * value / across[-1]

    parts, py, heads = [], 8.0, len(groups) > 1
    bottom = py + LINE * (len(every) + 1.5 * heads * len(groups))
    for tick in across:
        parts.append(f'<line class="grid" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="8" y2="{bottom:.1f}"/>')
        parts.append(_text(at(tick), bottom + 16, f"{tick:g}", "soft", "middle"))
    for i, (title, group) in enumerate(groups.items()):
        if heads:
            parts.append(f'<text x="8" y="{py + LINE + 4:.1f}" font-weight="600">{escape(title)}</text>')
            py += 1.5 * LINE
        first = at(group[0].value)
        parts.append(f'<line class="plain" x1="{first:.1f}" x2="{first:.1f}" y1="{py:.1f}" y2="{py + LINE * len(group):.1f}"/>')
        for dot in group:
            py += LINE
            colour, y, where = f"var(--c{i % COLOURS})", py - LINE / 2, f"{title}, " if heads else ""
            parts.append(
                f'<g>{_text(8, y + 4, dot.name)}<line class="range" stroke="{colour}" x1="{at(dot.low):.1f}" x2="{at(dot.high):.1f}" '
                f'y1="{y}" y2="{y}"/><circle cx="{at(dot.value):.1f}" cy="{y}" r="4" fill="{colour}">'
                f"{_title(f'{where}{dot.name}: {spread(dot.value, dot.low, dot.high)} {x}')}</circle></g>"
            )
    parts.append(_text(left + wide / 2, bottom + 34, x, "soft", "middle"))
    return _svg(bottom + 42, parts, x)


def spread(value: float, low: float = 0.0, high: float = 0.0) -> str:
    """A figure with three digits or more, and its spread if there is one."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{digits}f}" + (f" ({low:.{digits}f}-{high:.{digits}f})" if low != high else "")


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About six round numbers from `low` to `high` or beyond. whole: no fractions."""
    raw = max((high - low) / 6, 1.0 if whole else 1e-9)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw and (not whole or size * factor % 1 == 0))
    first = math.floor(low / step)
    return [round(i * step, 9) for i in range(first, max(math.ceil(high / step), first + 1) + 1)]


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    shown = text if len(text) <= LONGEST or kind else text[: LONGEST - 1] + "…"
    whole = _title(text) if shown != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(shown)}{whole}</text>'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _svg(height: float, parts: Seq[str], label: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return "\n".join([head, *parts, "</svg>"])
