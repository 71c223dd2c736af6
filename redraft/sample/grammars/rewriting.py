"""Keywords of arrays and objects that say in some schemas what another keyword says, which is enforced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["rewritten"]

IN_PLACE = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if", "dependencies", "dependentSchemas", "$dynamicRef", "$recursiveRef"})
MAX_DEPTH = 16  # references and schemas within each other


def rewritten(schema: dict[str, Any], resolve: Callable[[str], Any]) -> dict[str, Any]:
    """The schema without unevaluatedItems, unevaluatedProperties and propertyNames where others say the same; else with them.

    schema: any object. resolve: the schema that a reference means.
    """
    found = schema
    if "unevaluatedItems" in found and not found.keys() & IN_PLACE and "contains" not in found and not isinstance(found.get("items"), list):
        found = moved(found, "unevaluatedItems", "items")
    if "unevaluatedProperties" in found:
        if not found.keys() & IN_PLACE:
            found = moved(found, "unevaluatedProperties", "additionalProperties")
        elif isinstance(names := evaluated(found, resolve), frozenset):
            rest = {key: one for key, one in found.items() if key != "unevaluatedProperties"}
            others = {"properties": dict.fromkeys(sorted(names), True), "additionalProperties": found["unevaluatedProperties"]}
            found = {**rest, "allOf": [*found.get("allOf", ()), others]}
    return with_names(found, resolve) if "propertyNames" in found else found


def moved(schema: dict[str, Any], key: str, to: str) -> dict[str, Any]:
    """What the second keyword does not apply to is what the first would apply to."""
    rest = {name: one for name, one in schema.items() if name != key}
    return rest if to in rest else {**rest, to: schema[key]}


def evaluated(schema: Any, resolve: Callable[[str], Any], depth: int = 0) -> frozenset[str] | None:
    """The names of all properties that the schema applies to, whatever the value. None if that depends on the value or is not a list."""
    if isinstance(schema, bool):
        return frozenset()
    others = IN_PLACE - {"$ref", "allOf"} | {"patternProperties", "additionalProperties"}
    if depth:
        others |= {"unevaluatedProperties"}
    properties, parts = schema.get("properties", {}), schema.get("allOf", [])
    if depth > MAX_DEPTH or schema.keys() & others or not isinstance(properties, dict) or not isinstance(parts, list):
        return None
    parts = [*parts, *([resolve(schema["$ref"])] if "$ref" in schema else [])]
    names = [evaluated(part, resolve, depth + 1) if isinstance(part, (dict, bool)) else None for part in parts]
    found = [one for one in names if one is not None]
    return frozenset(properties).union(*found) if len(found) == len(names) else None


def with_names(schema: dict[str, Any], resolve: Callable[[str], Any]) -> dict[str, Any]:
    """Without propertyNames if it lists the names, or is a pattern and there are no other rules for names."""
    names = schema["propertyNames"]
    for _ in range(MAX_DEPTH):
        if isinstance(names, dict) and names.keys() == {"$ref"}:
            names = resolve(names["$ref"])
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    if not isinstance(names, dict) or "patternProperties" in schema or not isinstance(properties, dict):
        return schema
    asserting = names.keys() - {"type", "title", "description", "$comment"}
    rest = {key: one for key, one in schema.items() if key != "propertyNames"} | {"additionalProperties": False}
    if names.get("type", "string") == "string" and asserting in ({"enum"}, {"const"}):
        listed = names["enum"] if "enum" in names else [names["const"]]
        if isinstance(listed, list):
            texts = [one for one in listed if isinstance(one, str)]
            order = [name for name in properties if name in texts] + [name for name in texts if name not in properties]
            return {**rest, "properties": {name: properties.get(name, others) for name in order}}
    if names.get("type", "string") == "string" and asserting == {"pattern"} and not properties and isinstance(names["pattern"], str):
        return {**rest, "patternProperties": {names["pattern"]: others}}
    return schema
