"""Numbers in a JSON schema: those that every library reads as the same number."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from redraft.errors import shown
from redraft.sample.grammars.places import refused

__all__ = ["MAX_STEPS", "bound", "is_number", "number", "step"]

MAX_DIGITS = 15  # of a number: each decimal of so many digits is a different double
MAX_INTEGER = 2**53 - 1  # the last integer that a double tells from the next
MAX_STEPS = 10_000  # the largest multipleOf


def is_number(given: Any) -> bool:
    return isinstance(given, (int, float)) and not isinstance(given, bool)


def number(given: int | float, place: str) -> int | float:
    """The number. Raises InvalidInput for one that some library would read as another number."""
    return plain(exact(given, place))


def bound(given: Any, key: str, place: str) -> int | float:
    """A bound that is included. One that is excluded moves by a unit of its last digit, which no value of a usual size notices.

    Bounds beyond the integers that a double holds exactly move to the last of those.
    """
    if not is_number(given):
        raise refused(place, f"{shown(given)} is not allowed; a number is")
    if "inimum" in key and given < -MAX_INTEGER:
        return -MAX_INTEGER
    if "aximum" in key and given > MAX_INTEGER:
        return MAX_INTEGER
    limit = exact(given, place)
    if not key.startswith("exclusive"):
        return plain(limit)
    largest = 10 ** (MAX_DIGITS - 1)
    if abs(limit) > largest:
        raise refused(place, f"{shown(given)} is not supported; {-largest} to {largest} are")
    unit = Decimal(1).scaleb(max(limit.adjusted() - MAX_DIGITS + 1, -MAX_DIGITS) if limit else -MAX_DIGITS)
    return plain(limit + unit if key == "exclusiveMinimum" else limit - unit)


def step(given: Any, place: str) -> int | float:
    """The value of multipleOf."""
    if not is_number(given) or given <= 0:
        raise refused(place, f"{shown(given)} is not allowed; a positive number is")
    if given != 0.5 and (given != int(given) or given > MAX_STEPS):
        raise refused(
            place, f"{shown(given)} is not enforced; integers to {MAX_STEPS} and 0.5 are, as doubles hold their multiples exactly"
        )
    return given if given == 0.5 else int(given)


def exact(given: int | float, place: str) -> Decimal:
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    digits = Decimal(repr(given))
    if isinstance(given, int):
        if abs(given) > MAX_INTEGER:
            raise refused(place, f"{shown(given)} is not supported; integers from {-MAX_INTEGER} to {MAX_INTEGER} are")
    elif len(digits.as_tuple().digits) > MAX_DIGITS or int(digits.as_tuple().exponent) < -MAX_DIGITS:
        raise refused(place, f"{shown(given)} is not supported; numbers of at most {MAX_DIGITS} digits and decimal places are")
    return digits


def plain(digits: Decimal) -> int | float:
    return int(digits) if digits == digits.to_integral_value() else float(digits)
