"""A schema for what another schema does not match, in keywords that are enforced."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from redraft.sample.grammars.kinds import ANY_TYPE, type_of

__all__ = ["negated"]

MAX_DEPTH = 16  # schemas and references within each other
MAX_CHARACTERS = 1000  # of a pattern for strings other than some
OPPOSITE = {
    "minimum": ("number", "exclusiveMaximum", 0), "maximum": ("number", "exclusiveMinimum", 0),
    "exclusiveMinimum": ("number", "maximum", 0), "exclusiveMaximum": ("number", "minimum", 0),
    "minLength": ("string", "maxLength", -1), "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1), "maxItems": ("array", "minItems", 1),
    "minProperties": ("object", "maxProperties", -1), "maxProperties": ("object", "minProperties", 1),
}  # fmt: skip
NOT_NEGATED = frozenset(
    {
        "additionalItems", "additionalProperties", "contains", "dependencies", "dependentRequired", "dependentSchemas", "format", "if",
        "items", "multipleOf", "oneOf", "pattern", "patternProperties", "prefixItems", "propertyNames", "unevaluatedItems",
        "unevaluatedProperties", "uniqueItems",
    }
)  # fmt: skip
NEGATED = frozenset({"allOf", "anyOf", "const", "enum", "not", "properties", "required", "type", *OPPOSITE})


def negated(schema: Any, resolve: Callable[[str], Any], reference_alone: bool, depth: int = 0) -> Any:
    """None if there is no such schema.

    schema: one that was read before. resolve: the schema that a reference means. reference_alone: other keywords beside a reference have
    no effect, as in drafts before 2019-09; then they are enforced where more is enforced than must be, which it must not be here.
    """
    if isinstance(schema, bool):
        return not schema
    if depth > MAX_DEPTH:
        return None
    if reference_alone and "$ref" in schema and schema.keys() & (NEGATED | NOT_NEGATED):
        return None
    options: list[Any] = []
    try:
        for key, given in schema.items():
            found = opposite(key, given, lambda one: negated(one, resolve, reference_alone, depth + 1), resolve)
            if found is None:
                return None
            options += found
    except (AttributeError, TypeError):  # a reference leads to what was not read yet and is no schema
        return None
    options = [one for one in options if one is not False]
    return {"anyOf": options} if options else False


def opposite(key: str, given: Any, other: Callable[[Any], Any], resolve: Callable[[str], Any]) -> list[Any] | None:
    """Schemas one of which matches a value iff the keyword does not; None if there are none. other: the negation of a schema."""
    if key == "type":
        return opposite_of_types([given] if isinstance(given, str) else given)
    if key in ("const", "enum"):
        return opposite_of_constants([given] if key == "const" else given)
    if key == "required":
        return [{"type": "object", "properties": {name: False}} for name in given]
    if key == "properties":
        inner = {name: other(one) for name, one in given.items()}
        none = any(one is None for one in inner.values())
        return None if none else [{"type": "object", "required": [name], "properties": {name: one}} for name, one in inner.items()]
    if key in ("allOf", "anyOf"):
        each = [other(one) for one in given]
        if any(one is None for one in each):
            return None
        return each if key == "allOf" else [{"allOf": each}]
    if key == "not":
        return [given]
    if key == "$ref":
        found = other(resolve(given))
        return None if found is None else [found]
    if key in OPPOSITE:
        kind, opposed, change = OPPOSITE[key]
        if isinstance(given, bool):  # of draft 4
            return None
        return [{"type": kind, opposed: given + change}] if given + change >= 0 or kind == "number" else []
    return None if key in NOT_NEGATED else []


def opposite_of_types(types: list[str]) -> list[Any] | None:
    if "integer" in types and "number" not in types:
        return None
    others = sorted(ANY_TYPE - set(types))
    return [{"type": others}] if others else []


def opposite_of_constants(constants: list[Any]) -> list[Any] | None:
    kinds = {type_of(one) for one in constants}
    if kinds & {"array", "object"}:
        return None
    found: list[Any] = [{"type": sorted(ANY_TYPE - kinds)}]
    if "boolean" in kinds:
        found += [{"const": one} for one in (False, True) if not any(one is constant for constant in constants)]
    if "number" in kinds:
        values = sorted({one for one in constants if type_of(one) == "number"})
        found += [{"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high} for low, high in pairwise(values)]
        found += [{"type": "number", "exclusiveMaximum": values[0]}, {"type": "number", "exclusiveMinimum": values[-1]}]
    if "string" in kinds:
        pattern = other_strings([one for one in constants if isinstance(one, str)])
        if len(pattern) > MAX_CHARACTERS:
            return None
        found.append({"type": "string", "pattern": pattern})
    return found


def other_strings(strings: list[str]) -> str:
    """A pattern of all strings but these: those that end within one of them, and those that leave each of them at some character."""
    following: dict[str, set[str]] = {}
    for one in strings:
        for end in range(len(one)):
            following.setdefault(one[:end], set()).add(one[end])
    rows = [f"^{spelled(start)}[^{''.join(map(spelled, sorted(signs)))}]" for start, signs in following.items()]
    rows += [f"^{spelled(start)}$" for start in following if start not in strings]
    rows += [f"^{spelled(one)}(?:.|[\\n\\r\\u2028\\u2029])" for one in dict.fromkeys(strings) if one not in following]
    return "|".join(rows)


def spelled(text: str) -> str:
    """A string as a pattern spells it, within a set or not."""
    return "".join(sign if sign.isalnum() and sign.isascii() else f"\\{sign}" if sign >= " " else f"\\x{ord(sign):02x}" for sign in text)
