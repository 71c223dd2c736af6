"""The methods that a request may choose. They open no file, and their parts and numbers are bounded."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterator

from redraft import registry
from redraft.config import SamplingParams
from redraft.engine.budgets import CACHE
from redraft.errors import RedraftError
from redraft.serve.errors import Refused

FIELDS = {
    "draft": "speculation.method",
    "verify": "speculation.verifier",
    "keep": "cache.keep",
    "codec": "cache.codec",
    "read": "cache.read",
    "steer": "steer",
    "control": "control",
    "reuse": "reuse",
}
PARTS = 8  # drafters in one choice, including nested ones
LARGEST_DRAFT = 64  # of a number in a drafter's options, because its tables grow with it
LARGEST = 1 << 20  # of a number in the options of other methods, which count tokens
PLAIN = {int, float, bool, type(None)}  # types of options that a request may give
METHODS = ("parts", "draft")  # options that name methods
SHAPES = ("branching",)  # options that are numbers in a text


def checked(seam: str, text: str, own: str | None) -> str:
    """Returns `text` if a request may choose it. `own`, the server's choice, is always allowed. Refused (400) names the field, the
    value and what is allowed."""
    if text in (own, "none"):
        return text
    field = FIELDS[seam]
    try:
        several = registry.split(text, "+") if seam == "control" else [text]
        if (count := sum(_count(seam, one, field) for one in several)) > PARTS:
            raise Refused(400, f"{text}: it has {count} parts, at most {PARTS} are allowed in a request", field)
        for one in several:
            registry.create(seam, one)
    except RedraftError as error:
        raise Refused(400, str(error), field) from None
    except (OverflowError, MemoryError):
        raise Refused(400, f"{text}: an option is out of range", field) from None
    return text


def public(seam: str, text: str) -> str:
    """A choice of the server as clients see it: only the name if one of its options, or of its parts' options, is a path."""
    name, given = registry.parse(text)
    parts = [part for option in METHODS if option in given for part in registry.split(given[option], "+")]
    hides = any(_may_name_a_file(seam, name, option) for option in given) or any(public(seam, part) != part for part in parts)
    return name if hides else text


def cache_policy(params: SamplingParams) -> str:
    """The cache policy of a request as clients see it: "keep=name:option=value+codec=...", or none."""
    chosen = {seam: text for seam in CACHE if (text := getattr(params, seam)) is not None}
    return "+".join(f"{seam}={public(seam, text)}" for seam, text in chosen.items()) or "none"


def _count(seam: str, text: str, field: str) -> int:
    """The number of parts, after a check of all options."""
    name, given = registry.parse(text)
    for option, value in given.items():
        if _may_name_a_file(seam, name, option):
            raise Refused(400, f"{name}: a request cannot choose {option!r}: it may name a file", field)
        if option not in METHODS:
            _check_numbers(seam, f"{name}:{option}={value}", option, value, field)
    return sum(_count(seam, part, field) for part in _parts(seam, name, given)) or 1


def _parts(seam: str, name: str, given: dict[str, str]) -> Iterator[str]:
    """The methods inside a method, including those of its defaults."""
    for option, field in registry.options(registry.method(seam, name)).items():
        if option in METHODS:
            yield from registry.split(given.get(option, str(field.default)), "+")


def _check_numbers(seam: str, shown: str, option: str, value: str, field: str) -> None:
    largest = LARGEST_DRAFT if seam == "draft" else LARGEST
    for number in map(_number, re.findall(r"\d+", value) if option in SHAPES else [value]):
        if not math.isfinite(number):
            raise Refused(400, f"{shown}: a finite number is needed", field)
        if abs(number) > largest:
            raise Refused(400, f"{shown}: at most {largest} is allowed in a request", field)


def _may_name_a_file(seam: str, name: str, option: str) -> bool:
    method = registry.method(seam, name)
    if (field := registry.options(method).get(option)) is not None and "words" in field.metadata:
        return False
    hint = typing.get_type_hints(method).get(option, int)
    return not {*(typing.get_args(hint) or (hint,))} <= PLAIN and option not in METHODS + SHAPES


def _number(text: str) -> float:
    """The value of an option, 0 if it is not a number."""
    try:
        return float(text)
    except ValueError:
        return 0.0
