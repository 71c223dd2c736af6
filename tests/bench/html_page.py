"""Reads a page back: its tables, and what its plots say."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"


def tables(page: str) -> dict[str, list[list[str]]]:
    """Title of a section -> the rows of its table, the head first."""
    found = {}
    for part in page.split("<h2>")[1:]:
        rows = re.findall(r"<tr>(.*?)</tr>", part)
        found[unescape(part.partition("</h2>")[0])] = [
            [unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows
        ]
    return found


def plots(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(one) for one in re.findall(r"<svg.*?</svg>", page, re.S)]


def dots(plot: ElementTree.Element) -> dict[str, float]:
    """Name of each dot, as in its tooltip -> where it lies on the x axis, in units of the axis."""
    texts = [
        (float(t.get("x", "")), float(t.text or ""))
        for t in plot.findall(f"{SVG}text")
        if t.get("text-anchor") == "middle" and is_number(t.text)
    ]
    (x0, v0), (x1, v1) = texts[0], texts[-1]
    found = {}
    for circle in plot.iter(f"{SVG}circle"):
        name = circle.findtext(f"{SVG}title", "").rpartition(": ")[0]
        found[name] = v0 + (float(circle.get("cx", "")) - x0) * (v1 - v0) / (x1 - x0)
    return found


def is_number(text: str | None) -> bool:
    return re.fullmatch(r"[\d.]+", text or "") is not None


class Loads(HTMLParser):
    """What a browser would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag] * (tag in ("script", "iframe", "object"))
        self.found += [str(value) for name, value in attrs if name in ("src", "href") and not str(value).startswith("data:")]
        self.found += [name for name, _ in attrs if name.startswith("on")]


def loads(page: str) -> list[str]:
    parser = Loads()
    parser.feed(page)
    return parser.found + re.findall(r"@import|url\(", page)
