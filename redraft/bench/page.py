"""A page with plots and tables in one HTML file. It loads nothing and has no script."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from html import escape

from redraft.bench.svg import STYLE as PLOTS

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 760px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem } p, li, summary { color: var(--soft) }
div { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; margin: .6rem 0 }
td, th { padding: .15rem .9rem .15rem 0; text-align: right; font-weight: normal; white-space: nowrap }
td.text, th.text { text-align: left } th { color: var(--soft); border-bottom: 1px solid var(--grid) }
pre { overflow-x: auto; background: color-mix(in srgb, var(--grid) 40%, transparent); padding: .7rem 1rem; font-size: 13px }
"""


@dataclass(frozen=True)
class Section:
    """text: what is shown; plot: an SVG, empty without one; head, rows: the table of its figures."""

    title: str
    text: str
    plot: str = ""
    head: Seq[str] = ()
    rows: Seq[Seq[str]] = ()


def whole(title: str, facts: Seq[str], sections: Seq[Section], notes: Seq[str] = (), *, code: str = "") -> str:
    """facts: lines under the title; notes: a list at the end; code: a file that is shown whole before the sections."""
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title><style>{PLOTS}{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{'<br>'.join(map(escape, facts))}</p>",
    ]
    if code:
        parts.append(f"<pre>{escape(code)}</pre>")
    for section in sections:
        parts += [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.text)}</p>"]
        if section.plot:
            parts.append(section.plot)
        if section.rows:
            parts.append(table(section.head, section.rows))
    if notes:
        parts.append("<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


def table(head: Seq[str], rows: Seq[Seq[str]]) -> str:
    """Columns with letters in the first row are aligned left."""
    kinds = [' class="text"' if any(letter.isalpha() for letter in cell.removesuffix("x")) else "" for cell in rows[0]]
    heads = "".join(f"<th{kind}>{escape(cell)}</th>" for kind, cell in zip(kinds, head, strict=True))
    lines = ["".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows]
    return f"<div><table><tr>{heads}</tr>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"
