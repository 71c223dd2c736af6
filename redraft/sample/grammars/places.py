"""Places in a JSON schema as JSON pointers, and the errors that name them."""

from __future__ import annotations

from redraft.errors import InvalidInput

__all__ = ["refused", "within"]


def refused(place: str, problem: str) -> InvalidInput:
    return InvalidInput(f"structured_outputs.json: {place}: {problem}")


def within(place: str, key: str | int) -> str:
    return f"{place}/{str(key).replace('~', '~0').replace('/', '~1')}"
