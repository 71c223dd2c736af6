"""Whether two schemas can have a value in common, as far as it is plain to see from types, constants and required properties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ANY_TYPE", "TYPES", "Kinds", "Sorter", "apart", "type_of"]

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
ANY_TYPE = frozenset(TYPES) - {"integer"}  # integers are numbers


@dataclass(frozen=True)
class Kinds:
    """What holds for all values of a schema. Required and properties only matter to objects."""

    types: frozenset[str] = ANY_TYPE
    constants: frozenset[tuple[str, Any]] | None = None  # type and value; None: any
    required: frozenset[str] = frozenset()
    properties: dict[str, Kinds] = field(default_factory=dict)

    def and_also(self, other: Kinds) -> Kinds:
        """What holds for values of both. Of a property that both name, only the other is kept."""
        both = [one for one in (self.constants, other.constants) if one is not None]
        constants = frozenset.intersection(*both) if both else None
        return Kinds(self.types & other.types, constants, self.required | other.required, {**self.properties, **other.properties})


def apart(a: Kinds, b: Kinds) -> bool:
    """Whether surely no value is of both kinds."""
    common = a.types & b.types
    if not common or (a.constants is not None and b.constants is not None and not a.constants & b.constants):
        return True
    named = (a.required | b.required) & a.properties.keys() & b.properties.keys()
    return common == {"object"} and any(apart(a.properties[name], b.properties[name]) for name in named)


class Sorter:
    """Finds the kinds of schemas that were read before. resolve: the schema that a reference means. reference_alone: other keywords beside
    a reference have no effect, as in drafts before 2019-09."""

    def __init__(self, resolve: Callable[[str], Any]) -> None:
        self.resolve = resolve
        self.reference_alone = False
        self.seen: dict[int, Kinds] = {}  # by the id of a schema

    def kinds(self, schema: Any) -> Kinds:
        if isinstance(schema, bool):
            return Kinds() if schema else Kinds(frozenset())
        if id(schema) not in self.seen:
            self.seen[id(schema)] = Kinds()  # of a schema within itself
            self.seen[id(schema)] = self.read(schema)
        return self.seen[id(schema)]

    def read(self, schema: dict[str, Any]) -> Kinds:
        if self.reference_alone and "$ref" in schema:
            return self.kinds(self.resolve(schema["$ref"]))
        types = ANY_TYPE
        if "type" in schema:
            named = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
            types = frozenset("number" if name == "integer" else name for name in named)
        properties = {name: self.kinds(one) for name, one in schema.get("properties", {}).items()}
        found = Kinds(types, None, frozenset(schema.get("required", ())), properties)
        constants = [schema["const"]] if "const" in schema else schema.get("enum")
        if constants is not None:
            own = frozenset(map(type_of, constants))
            values = None if own & {"array", "object"} else frozenset((type_of(one), one) for one in constants)
            found = found.and_also(Kinds(own, values))
        for key in ("anyOf", "oneOf"):
            if key in schema:
                found = found.and_also(Kinds(frozenset().union(*(self.kinds(one).types for one in schema[key]))))
        for one in schema.get("allOf", ()):
            found = found.and_also(self.kinds(one))
        if "$ref" in schema:
            found = found.and_also(self.kinds(self.resolve(schema["$ref"])))
        return found


def type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"
