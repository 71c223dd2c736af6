"""Reasoning of Magistral: [THINK]...[/THINK]."""

from __future__ import annotations

from redraft.serve.parsers.think import Think


class Magistral(Think):
    OPEN = "[THINK]"
    CLOSE = "[/THINK]"
    MARKS = (OPEN, CLOSE)
