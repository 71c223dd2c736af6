"""How large a schema is for its compiler, which writes out references and all ways to combine the alternatives of its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Extent", "extent"]


@dataclass(frozen=True)
class Extent:
    """size: schemas and constants, written out; depth: of schemas within each other; ways: alternatives for one value."""

    size: int = 1
    depth: int = 1
    ways: int = 1


def extent(schema: Any, definitions: dict[str, Any]) -> Extent:
    """schema: as compiled. definitions: by name; #/$defs/NAME refers to one. One that is within itself counts once."""
    done: dict[str, Extent] = {}

    def named(name: str) -> Extent:
        if name not in done:
            done[name] = Extent()
            done[name] = of(definitions[name])
        return done[name]

    def of(value: Any) -> Extent:
        if not isinstance(value, dict):
            return Extent()
        inner = [*value.get("properties", {}).values(), *value.get("patternProperties", {}).values(), *value.get("prefixItems", ())]
        inner += [value[key] for key in ("items", "additionalProperties") if key in value]
        below = [of(one) for one in inner]
        own = Extent(1 + sum(one.size for one in below), 1 + max((one.depth for one in below), default=0))
        return together([own, *parts(value)])

    def parts(value: dict[str, Any]) -> list[Extent]:
        """What applies to the same value besides the keywords of its types."""
        found = [of(one) for one in value.get("allOf", ())]
        if "$ref" in value:
            found.append(named(value["$ref"].rpartition("/")[2]))
        if "anyOf" in value:
            options = [of(one) for one in value["anyOf"]]
            depth = 1 + max(one.depth for one in options)
            found.append(Extent(sum(one.size for one in options), depth, sum(one.ways for one in options)))
        if "const" in value:
            found.append(Extent(constants(value["const"])))
        if "enum" in value:
            found.append(Extent(constants(value["enum"]), 1, len(value["enum"])))
        return found

    return of(schema)


def together(parts: list[Extent]) -> Extent:
    """Parts that all apply to one value: each alternative of one meets each of the others."""
    ways = math.prod(part.ways for part in parts)
    return Extent(sum(part.size * (ways // part.ways) for part in parts), max(part.depth for part in parts), ways)


def constants(value: Any) -> int:
    """Constants in a constant, itself included."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(constants, inner))
