"""Lines of progress fit 80 columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from redraft_train import progress
from redraft_train.progress import COLUMNS, Progress
from redraft_train.train import Measured, Moment

LARGE = Measured(99_999, 9.0, [0.999] * 8, [0.999] * 8)


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_fit_the_terminal(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "FRAME", 0.0)
    out = io.StringIO()
    shown = Progress(Console(file=out, force_terminal=terminal, width=COLUMNS, color_system=None))
    with shown.stage("training"):
        shown.show(progress.training(Moment(99_999, 99.99, 99_999.0, 5_999.0, LARGE)))
        shown.show(progress.trained(999_999_999, LARGE))
    lines = [part for line in out.getvalue().splitlines() for part in line.split("\r")]
    assert all(len(line) <= COLUMNS for line in lines)
    assert "training  step 99,999 loss 99.99 held-out 1.00 1.00 1.00 1.00 1.00" in out.getvalue()
    assert lines[-1].startswith("training  999,999,999 tokens") or lines[-2].startswith("training  999,999,999 tokens")


@pytest.mark.parametrize(("seconds", "words"), [(-1, "0 s left"), (89, "89 s left"), (90, "2 min left"), (3600, "60 min left")])
def test_what_is_left(seconds: float, words: str) -> None:
    assert progress.left(seconds) == words
