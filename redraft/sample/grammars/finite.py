"""Whether a schema has a finite value: not if each value requires another one of the same schema within it."""

from __future__ import annotations

from typing import Any

from redraft.sample.grammars.kinds import ANY_TYPE

__all__ = ["has_finite_value"]


def has_finite_value(schema: Any, definitions: dict[str, Any]) -> bool:
    """schema: as compiled; #/$defs/NAME refers to one of the definitions. What excludes values in other ways counts as none."""
    finite: set[str] = set()

    def of(value: Any) -> bool:
        if not isinstance(value, dict):
            return bool(value)
        parts = [of(one) for one in value.get("allOf", ())]
        if "$ref" in value:
            parts.append(value["$ref"].rpartition("/")[2] in finite)
        if "anyOf" in value:
            parts.append(any(of(one) for one in value["anyOf"]))
        return all(parts) and ("const" in value or "enum" in value or of_types(value))

    def of_types(value: dict[str, Any]) -> bool:
        types = value.get("type", ANY_TYPE)
        types = {types} if isinstance(types, str) else set(types)
        if types - {"array", "object"}:
            return True
        return ("array" in types and of_array(value)) or ("object" in types and of_object(value))

    def of_array(value: dict[str, Any]) -> bool:
        first, least = value.get("prefixItems", []), value.get("minItems", 0)
        return all(of(one) for one in first[:least]) and (least <= len(first) or of(value.get("items", True)))

    def of_object(value: dict[str, Any]) -> bool:
        properties = value.get("properties", {})
        return all(of(properties.get(name, True)) for name in value.get("required", ()))

    while found := {name for name in definitions.keys() - finite if of(definitions[name])}:
        finite |= found
    return of(schema)
