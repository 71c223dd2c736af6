"""Ranges of options. A value outside is refused in one line, however the method is made."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, nan

import pytest

from redraft import registry
from redraft.errors import InvalidInput
from redraft.options import Options, Range, number


@dataclass(frozen=True)
class Method(Options):
    share: float = number(0.5, gt=0, lt=1)
    rows: int = number(64, ge=32, multiple_of=32)
    skip: int | None = number(None, ge=0)
    free: str = "any"


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("share", 0.0, "above 0 and below 1"),
        ("share", 1.0, "above 0 and below 1"),
        ("share", nan, "above 0 and below 1"),
        ("share", -inf, "above 0 and below 1"),
        ("rows", 0, "a multiple of 32 and 32 or more"),
        ("rows", 40, "a multiple of 32 and 32 or more"),
        ("rows", None, "a multiple of 32 and 32 or more"),
        ("skip", -1, "0 or more"),
    ],
)
def test_what_lies_outside_is_refused(option: str, value: object, allowed: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        Method(**{option: value})  # type: ignore[arg-type]
    assert str(refused.value) == f"Method:{option}={value}: must be {allowed}"


def test_what_lies_inside_is_taken() -> None:
    assert Method(share=0.1, rows=96, skip=3) == Method(0.1, 96, 3, "any")
    assert Method().skip is None


def test_a_range_in_words() -> None:
    assert [str(Range(ge=1)), str(Range(ge=0, le=1)), str(Range(gt=0)), str(Range(le=9, gt=2))] == [
        "1 or more", "0 to 1", "above 0", "above 2 and 9 or less",
    ]  # fmt: skip


@pytest.mark.parametrize("seam", registry.METHODS)
def test_defaults_of_registered_methods_are_in_range(seam: str) -> None:
    for name in registry.METHODS[seam]:
        for option in registry.options(registry.method(seam, name)).values():
            allowed = option.metadata.get("range")
            assert allowed is None or option.default in allowed or option.default is None, f"{name}:{option.name}"
