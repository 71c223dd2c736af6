"""A budget of time as text."""

from __future__ import annotations

import pytest

from redraft.errors import InvalidInput
from redraft_train.budget import seconds


@pytest.mark.parametrize(("text", "found"), [("1h", 3600), ("40m", 2400), ("90s", 90), ("1h30m", 5400), (" 1H1M1S ", 3661)])
def test_times(text: str, found: float) -> None:
    assert seconds(text) == found


@pytest.mark.parametrize("text", ["", "0s", "1", "-1h", "1d", "m", "30m1h", "1.5h", "1h 30m", "١h"])
def test_no_times(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"--budget = .*: a time such as 1h, 40m or 1h30m is needed"):
        seconds(text)
