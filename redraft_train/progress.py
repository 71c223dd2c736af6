"""What `redraft train` shows while it works: one line that changes on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from redraft.columns import fold

if TYPE_CHECKING:
    from redraft_train.train import Measured, Moment

EVERY = 15.0  # seconds between two lines without a terminal
FRAME = 0.2  # between two forms of the line on a terminal
COLUMNS = 80


class Progress:
    """Lines of at most 80 columns on stderr. A line has the name of a stage and how it stands."""

    def __init__(self, console: Console) -> None:
        self.console, self.name, self.began, self.printed, self.last = console, "", 0.0, 0.0, ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Its last form stays."""
        self.name, self.began, self.printed, self.last = name, time.monotonic(), time.monotonic(), ""
        try:
            yield
        finally:
            if self.last:
                self._over("")
                self.say(self.last)

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return max(1e-9, time.monotonic() - self.began)

    def show(self, text: str) -> None:
        """How the stage stands now."""
        self.last = f"{self.name:<9} {text}"
        now = time.monotonic()
        if now - self.printed < (FRAME if self.console.is_terminal else EVERY):
            return
        self.printed = now
        if self.console.is_terminal:
            self._over(self.last)
        else:
            self.say(self.last)

    def _over(self, line: str) -> None:
        """Writes over the line of a terminal."""
        if self.console.is_terminal:
            self.console.file.write(f"\r{line[: COLUMNS - 1].ljust(COLUMNS - 1)}\r")  # rich would leave out the control character
            self.console.file.flush()

    def say(self, text: str) -> None:
        for line in fold(text, COLUMNS):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def training(moment: Moment) -> str:
    """The line of a moment of training, at most 70 columns."""
    return f"step {moment.step:,} loss {moment.loss:.2f} held-out {shares(moment.measured)} {moment.speed:,.0f} tok/s, {left(moment.left)}"


def trained(tokens: int, best: Measured) -> str:
    return f"{tokens:,} tokens, held-out {shares(best)}, {best.tokens:.2f} tokens a step in a chain"


def shares(measured: Measured) -> str:
    """The share of held-out tokens that are guessed at each depth, at most five."""
    return " ".join(f"{share:.2f}".lstrip("0") for share in measured.accuracy[:5])


def left(seconds: float) -> str:
    return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{max(0, seconds):.0f} s left"
