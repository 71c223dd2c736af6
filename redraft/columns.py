"""Text that fits the terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap


def width() -> int:
    """Columns of the terminal: COLUMNS where it is set, 80 if the output is not a terminal."""
    if "COLUMNS" not in os.environ and not sys.stdout.isatty():
        return 80
    return shutil.get_terminal_size((80, 24)).columns


def fold(line: str, columns: int, hang: int = 2) -> list[str]:
    """A line broken between words. Its further lines are indented by `hang` more columns. A word longer than a line is not broken."""
    if len(line) <= columns:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + hang)
    return textwrap.wrap(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
