"""Which JSON schemas may constrain a text: what llguidance would not enforce is refused by name, the rest is written in the form that it
enforces.

Schemas are read as draft 2020-12, or as the older draft that $schema names. Keywords that no draft has are annotations, without effect.
"""

from __future__ import annotations

import json
from typing import Any

from redraft.errors import shown
from redraft.sample.grammars.extent import extent
from redraft.sample.grammars.finite import has_finite_value
from redraft.sample.grammars.form import COMPILED_AS, LIMITS, problem
from redraft.sample.grammars.places import refused
from redraft.sample.grammars.reader import MAX_DEPTH, Reader

__all__ = ["COMPILED_AS", "LIMITS", "checked"]

KEYWORDS = frozenset(
    {
        "$anchor", "$comment", "$defs", "$dynamicAnchor", "$dynamicRef", "$id", "$recursiveAnchor", "$recursiveRef", "$ref", "$schema",
        "$vocabulary", "additionalItems", "additionalProperties", "allOf", "anyOf", "const", "contains", "contentEncoding",
        "contentMediaType", "contentSchema", "default", "definitions", "dependencies", "dependentRequired", "dependentSchemas",
        "deprecated", "description", "disallow", "else", "enum", "examples", "exclusiveMaximum", "exclusiveMinimum", "extends", "format",
        "id", "if", "items", "maxContains", "maxItems", "maxLength", "maxProperties", "maximum", "minContains", "minItems", "minLength",
        "minProperties", "minimum", "multipleOf", "not", "oneOf", "pattern", "patternProperties", "prefixItems", "properties",
        "propertyNames", "readOnly", "required", "then", "title", "type", "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
        "writeOnly", "x-guidance",
    }
)  # fmt: skip
WRAPPED = "; the one in its field 'schema' may be meant"
MAX_TEXT = 256 * 1024  # bytes of a schema
MAX_SIZE = 20_000  # schemas and constants, once references and combinations of alternatives are written out


def checked(schema: Any) -> dict[str, Any]:
    """The schema as the grammar compiler gets it, with COMPILED_AS. Raises InvalidInput that names the keyword and its place (JSON pointer,
    such as #/properties/age/multipleOf) if it would not be enforced, or if the schema is no valid schema."""
    refuse_no_json(schema)
    if isinstance(schema, dict) and schema and not schema.keys() & KEYWORDS:
        raise refused("#", f"{shown(schema)} has no keyword of JSON Schema, so it is no schema{WRAPPED if 'schema' in schema else ''}")
    reader = Reader(schema)
    read = reader.schema(schema, "#", 0)
    if read is False:
        raise refused("#", "false allows no value at all")
    reader.refuse_endless()
    root: dict[str, Any] = {} if read is True else read
    needs = extent(root, reader.definitions)
    if needs.size > MAX_SIZE or needs.depth > MAX_DEPTH:
        most = f"{MAX_SIZE} schemas and constants, {MAX_DEPTH} of them within each other"
        raise refused("#", f"is too large once references and alternatives are combined; {most} are allowed")
    if not has_finite_value(root, reader.definitions):
        raise refused("#", "no value can satisfy the schema")
    if reader.definitions:
        root["$defs"] = reader.definitions
    if found := problem(root):
        raise refused("#", found)
    return root


def refuse_no_json(schema: Any) -> None:
    """Refuses values that JSON does not have, and what is too large or too deep to read."""
    level, depth = [schema], 0
    while level:
        if depth > MAX_DEPTH:
            raise refused("#", f"has more than {MAX_DEPTH} arrays and objects within each other, which is not allowed")
        deeper: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                if not all(isinstance(key, str) for key in value):
                    raise refused("#", "has a key that is not a string")
                deeper.extend(value.values())
            elif isinstance(value, list):
                deeper.extend(value)
            elif value is not None and not isinstance(value, (bool, int, float, str)):
                raise refused("#", f"{shown(value)} is no JSON value")
        level, depth = deeper, depth + 1
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except UnicodeEncodeError:
        raise refused("#", "has half of a surrogate pair in a string") from None
    except ValueError as error:
        raise refused("#", f"is no JSON: {shown(error)}") from None
    if size > MAX_TEXT:
        raise refused("#", f"has {size} bytes; at most {MAX_TEXT} are allowed")
