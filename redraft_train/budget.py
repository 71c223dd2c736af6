"""A budget of time, and how it is shared between the parts of a training."""

from __future__ import annotations

import re

from redraft.errors import InvalidInput, shown

_UNITS = {"h": 3600, "m": 60, "s": 1}
TEXTS, STATES, COMPARISON = 0.2, 0.2, 0.1  # shares of the budget, at most; training has the rest


def seconds(text: str) -> float:
    """Of "1h", "40m", "90s" or "1h30m". InvalidInput for anything else, and for less than a second.

    >>> seconds("1h30m")
    5400.0
    """
    found = re.fullmatch(r"(?=\d)(?:(\d{1,4})h)?(?:(\d{1,5})m)?(?:(\d{1,6})s)?", text.strip().lower(), re.ASCII)
    total = sum(int(part or 0) * unit for part, unit in zip(found.groups(), _UNITS.values(), strict=True)) if found else 0
    if not total:
        raise InvalidInput(f"--budget = {shown(text)}: a time such as 1h, 40m or 1h30m is needed")
    return float(total)
