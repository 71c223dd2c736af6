"""A JSON schema is enforced, or refused by name and place."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.errors import InvalidInput
from redraft.sample.grammars.json_schema import checked
from redraft.sample.grammars.reader import NOT_ENFORCED
from tests.sample.grammars.schemas import Schemas, value
from tests.sample.grammars.texts import Grammar, judge, values

OLD = "http://json-schema.org/draft-07/schema#"
OLDEST = "http://json-schema.org/draft-04/schema#"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_every_text_of_a_grammar_is_valid_and_no_invalid_value_is_accepted(seed: int) -> None:
    rng = Random(seed)
    for schema in (Schemas(rng).root() for _ in range(4)):
        try:
            grammar = Grammar(schema)
        except InvalidInput:
            continue
        others = judge(schema)
        for text in filter(None, (grammar.walk(rng, hard=300) for _ in range(3))):
            assert all(others.is_valid(one) for one in values(text)), (schema, text)
        for one in (value(rng) for _ in range(6)):
            assert others.is_valid(one) or not grammar.accepts_value(one), (schema, one)


REFUSED: list[tuple[Any, str, str]] = [
    ({"allOf": {"type": "integer"}, "properties": {"a": {"not": {"$ref": "#"}}}}, "#/properties/a/not", "not enforced"),
    (None, "#", "is no schema"),
    ([], "#", "is no schema"),
    (False, "#", "false allows no value"),
    ({"items": 3}, "#/items", "is no schema"),
    ({"type": "text"}, "#/type", "'text' is no type"),
    ({"type": []}, "#/type", "is not allowed"),
    ({"type": ["string", "string"]}, "#/type", "different types"),
    ({"enum": []}, "#/enum", "not empty"),
    ({"anyOf": []}, "#/anyOf", "not empty"),
    ({"allOf": {}}, "#/allOf", "not empty"),
    ({"properties": []}, "#/properties", "an object of schemas"),
    ({"properties": {"a/b": {"minimum": "1"}}}, "#/properties/a~1b/minimum", "a number is"),
    ({"required": "a"}, "#/required", "different strings"),
    ({"required": ["a", "a"]}, "#/required", "different strings"),
    ({"minItems": -1}, "#/minItems", "0 to"),
    ({"maxLength": 1.5}, "#/maxLength", "0 to"),
    ({"minimum": True}, "#/minimum", "a number is"),
    ({"maximum": 0.12345678901234567}, "#/maximum", "15 digits"),
    ({"minimum": 2**53}, "#/minimum", "integers from"),
    ({"const": 2**60}, "#/const", "integers from"),
    ({"enum": [1, 2**53 + 1]}, "#/enum/1", "integers from"),
    ({"const": "\x00"}, "#/const", "control character"),
    ({"const": "\ud800"}, "#", "surrogate"),
    ({"const": float("nan")}, "#", "is no JSON"),
    ({"const": {1}}, "#", "is no JSON value"),
    ({1: True}, "#", "not a string"),
    ({"properties": {"age": {"multipleOf": 0.01}}}, "#/properties/age/multipleOf", "not enforced"),
    ({"multipleOf": 0}, "#/multipleOf", "a positive number"),
    ({"multipleOf": 10_001}, "#/multipleOf", "not enforced"),
    ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "#/allOf/1/multipleOf", "in common"),
    ({"format": "phone"}, "#/format", "not enforced"),
    ({"format": "unknown"}, "#/format", "not enforced"),
    ({"format": ["date"]}, "#/format", "not enforced"),
    ({"format": "int32"}, "#/format", "not enforced without the type integer"),
    ({"type": ["integer", "string"], "format": "int64"}, "#/format", "not enforced without the type integer"),
    ({"type": "string", "format": "double"}, "#/format", "not enforced without the type integer or number"),
    ({"pattern": "a(?=b)"}, "#/pattern", "a look-around"),
    ({"pattern": "(a)\\1"}, "#/pattern", "\\1"),
    ({"pattern": "\\bword"}, "#/pattern", "\\b"),
    ({"pattern": "a^b"}, "#/pattern", "a place other than its start or end"),
    ({"pattern": "(?i)a"}, "#/pattern", "the group (?i)"),
    ({"pattern": "a{3000}"}, "#/pattern", "at most"),
    ({"pattern": "^(a+b){0,20}$", "maxLength": 5000}, "#/pattern", "too complex"),
    ({"pattern": 3}, "#/pattern", "is no pattern"),
    ({"patternProperties": {"a(?!b)": {}}}, "#/patternProperties/a(?!b)", "a look-around"),
    ({"patternProperties": {"a": {}, "b": {}}}, "#/patternProperties", "two patterns"),
    ({"patternProperties": {"^.$": {}}, "additionalProperties": {"type": "null"}}, "#/patternProperties/^.$", "the dialect"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "#/oneOf", "both option 0 and option 1"),
    ({"oneOf": [{"type": "string"}, {"pattern": "a"}]}, "#/oneOf", "both option 0 and option 1"),
    ({"not": {"pattern": "a"}}, "#/not", "does not match this schema is not enforced"),
    ({"not": {"type": "integer"}}, "#/not", "does not match this schema is not enforced"),
    ({"not": {"const": [1]}}, "#/not", "does not match this schema is not enforced"),
    ({"if": {"format": "date"}, "then": False}, "#/if", "does not match this schema is not enforced"),
    ({"then": {"type": "null"}}, "#/then", "no effect without if"),
    ({"else": {"type": "null"}}, "#/else", "no effect without if"),
    ({"dependentRequired": {"a": {}}}, "#/dependentRequired/a", "a list is"),
    ({"dependentSchemas": {"a": ["b"]}}, "#/dependentSchemas/a", "a schema is"),
    ({"dependencies": ["a"]}, "#/dependencies", "an object of schemas"),
    ({"$ref": "#/$defs/a", "unevaluatedProperties": False, "$defs": {"a": {"anyOf": [{}]}}}, "#/unevaluatedProperties", "not enforced"),
    ({"propertyNames": {"maxLength": 3}}, "#/propertyNames", "not enforced"),
    ({"prefixItems": [{}], "additionalItems": False}, "#/additionalItems", "not enforced"),
    ({"minProperties": 2}, "#/minProperties", "names could repeat"),
    ({"properties": {"a": {}}, "minProperties": 1}, "#/minProperties", "beside optional properties"),
    ({"properties": {"a": {}, "b": {}, "c": {}}, "maxProperties": 2}, "#/maxProperties", "beside optional properties"),
    ({"$schema": "https://example.com/own"}, "#/$schema", "not supported"),
    ({"items": {"$schema": OLD}}, "#/items/$schema", "another draft"),
    ({"items": [{}]}, "#/items", "prefixItems is"),
    ({"$schema": OLD, "not": {"$ref": "#/definitions/a", "type": "null"}, "definitions": {"a": {}}}, "#/not", "not enforced"),
    (
        {"$schema": OLD, "oneOf": [{"$ref": "#/definitions/a", "type": "null"}, {"minLength": 1}], "definitions": {"a": {"pattern": "a"}}},
        "#/oneOf",
        "both option 0 and option 1",
    ),
    ({"$schema": OLD, "prefixItems": [{}]}, "#/prefixItems", "of draft 2020-12"),
    ({"$schema": OLDEST, "exclusiveMinimum": 3}, "#/exclusiveMinimum", "in draft 4"),
    ({"$ref": "https://example.com/s.json"}, "#/$ref", "not supported"),
    ({"$ref": "file:///etc/hostname"}, "#/$ref", "not supported"),
    ({"$ref": "other.json#/a"}, "#/$ref", "not supported"),
    ({"$ref": "#name"}, "#/$ref", "not supported"),
    ({"$ref": "#/$defs/a"}, "#/$ref", "refers to nothing"),
    ({"$ref": 3}, "#/$ref", "is no reference"),
    ({"$ref": "#"}, "#", "defined by itself"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}}, "#/$defs/a", "defined by itself"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"contains": {}}}}, "#/$defs/a/contains", "not enforced"),
    ({"oneOf": [{"type": "number"}, {"type": "number"}]}, "#", "no value can satisfy"),
    ({"items": {"$id": "https://example.com/s", "items": {"$ref": "#"}}}, "#/items/items/$ref", "its own $id"),
    ({"type": "integer", "minimum": 2, "maximum": 1}, "#", "no value can satisfy"),
    ({"type": "string", "const": 3}, "#", "no value can satisfy"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "#", "no value can satisfy"),
    ({"type": ["array"], "items": {"anyOf": [{"$ref": "#"}, False]}, "minItems": 1}, "#", "no value can satisfy"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "place", "problem"), REFUSED, ids=[f"{place} {problem}" for _, place, problem in REFUSED])
def test_refused_by_name_and_place(schema: Any, place: str, problem: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        checked(schema)
    assert str(raised.value).startswith(f"structured_outputs.json: {place}: ")
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", sorted(NOT_ENFORCED))
def test_what_is_not_enforced_is_refused_wherever_it_stands(key: str) -> None:
    for schema, place in (({}, "#"), ({"type": "object", "properties": {"a": {}}}, "#/properties/a"), ({"anyOf": [True, {}]}, "#/anyOf/1")):
        inner = schema
        for part in place.split("/")[1:]:
            inner = inner[int(part) if part.isdigit() else part]
        inner[key] = "own" if key == "x-guidance" else {"contains": False}
        inner["allOf"] = [{"anyOf": [{}]}]
        with pytest.raises(InvalidInput, match="not enforced") as raised:
            checked(schema)
        assert f"{place}/{key}: " in str(raised.value)


def nested(depth: int) -> Any:
    schema: Any = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def chained(length: int, **beside: Any) -> Any:
    """Definitions each of which has the next one twice."""
    names = [f"d{i}" for i in range(length)]
    each = [{"properties": {"a": {"$ref": f"#/$defs/{name}", **beside}, "b": {"$ref": f"#/$defs/{name}", **beside}}} for name in names[1:]]
    return {"$ref": "#/$defs/d0", "$defs": dict(zip(names, [*each, {}], strict=True))}


LARGE: dict[str, Any] = {
    "text": {"description": "a" * 300_000},
    "depth": nested(100),
    "endless depth": nested(100_000),
    "schemas": {"anyOf": [{"minLength": i} for i in range(3000)]},
    "properties": {"properties": {f"p{i}": {} for i in range(600)}},
    "required": {"required": [f"p{i}" for i in range(600)]},
    "constants": {"enum": list(range(3000))},
    "patterns": {"patternProperties": {f"^p{i}_": {} for i in range(100)}},
    "items": {"maxItems": 10**9},
    "a chain of references": chained(100),
    "references within references": chained(30, type="object"),
    "alternatives": {"allOf": [{"anyOf": [{"required": [f"{i} {j}"]} for j in range(9)]} for i in range(9)]},
}


@pytest.mark.parametrize("name", LARGE)
def test_too_large_is_refused_before_it_is_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redraft.sample.grammars.json_schema.problem", lambda schema: pytest.fail("compiled"))
    with pytest.raises(InvalidInput, match="allowed"):
        checked(LARGE[name])


ENFORCED: list[tuple[Any, list[str], list[str]]] = [
    (True, ["1", '{"a": [null]}'], ["", "nul", "{"]),
    ({}, ["-1.5e+3", '"é"'], ["01", '"\n"']),
    ({"type": "object"}, ["{}", '{"a": {"b": [1, 2]}}'], ["[]", '{"a":1}', '{"a": 1,"b": 2}', "{ }"]),
    # names
    ({"properties": {"a": {"type": "null"}}}, ['{"a": null}', '{"b": 1}'], ['{"a": 1}', '{"\\u0061": 1}', '{"b": 1, "a": 1}']),
    ({"properties": {'"\n': {"type": "null"}}}, ['{"\\"\\n": null}', '{"\\\\": 1}'], ['{"\\"\\n": 1}', '{"\\u0022\\u000a": 1}']),
    ({"properties": {"a": False}}, ['{"b": 1}'], ['{"a": 1}']),
    ({"patternProperties": {"^a": {"type": "null"}}}, ['{"b": 1, "ab": null}'], ['{"ab": 1}', '{"\\u0061b": 1}']),
    ({"patternProperties": {"^a": {}}, "additionalProperties": False}, ['{"ab": 1}'], ['{"b": 1}']),
    ({"properties": {"a1": {}}, "patternProperties": {"^a": {"type": "null"}}}, ['{"a1": null}'], ['{"a1": 1}', '{"a2": 1}']),
    ({"additionalProperties": False, "properties": {"a": {}}, "required": ["a"]}, ['{"a": 1}'], ["{}", '{"a": 1, "b": 1}']),
    ({"additionalProperties": {"type": "null"}, "required": ["a"]}, ['{"a": null, "b": null}'], ['{"a": 1}', '{"b": null}']),
    ({"minProperties": 1}, ['{"a": 1}', "[]"], ["{}"]),
    ({"maxProperties": 1}, ["{}", '{"a": 1}'], ['{"a": 1, "b": 1}']),
    (
        {"properties": {"a": {}, "b": {}}, "additionalProperties": False, "minProperties": 1, "maxProperties": 1},
        ['{"a": 1}', '{"b": 1}'],
        ["{}", '{"a": 1, "b": 1}'],
    ),
    ({"properties": {"a": {}}, "additionalProperties": False, "maxProperties": 1}, ["{}", '{"a": 1}'], ['{"a": 1, "a": 1}']),
    # parts
    ({"allOf": [{"minimum": 2}, {"maximum": 3}], "type": "integer"}, ["2", "3"], ["1", "4"]),
    ({"allOf": [{"pattern": "a"}, {"pattern": "b"}], "type": "string"}, ['"ab"', '"ba"'], ['"a"', '"b"']),
    ({"anyOf": [{"type": "null"}, {"const": 1}]}, ["null", "1"], ["2"]),
    ({"anyOf": [{"type": "null"}], "oneOf": [{"type": "null"}, {"type": "string"}]}, ["null"], ['"a"']),
    ({"oneOf": [{"type": "null"}, {"type": "string"}]}, ["null", '"a"'], ["1"]),
    (
        {
            "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
            "$defs": {
                "a": {"type": "object", "properties": {"kind": {"const": "a"}, "x": {"type": "null"}}, "required": ["kind"]},
                "b": {"type": "object", "properties": {"kind": {"enum": ["b", "c"]}}, "required": ["kind"]},
            },
        },
        ['{"kind": "a", "x": null}', '{"kind": "c", "x": 1}'],
        ['{"kind": "a", "x": 1}', '{"kind": "d"}', "{}"],
    ),
    ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, ['{"a": 1}', '{"b": 1}'], ["{}", '{"a": 1, "b": 1}', "1"]),
    ({"oneOf": [{"minimum": 2}, {"maximum": 3}], "type": "integer"}, ["1", "4"], ["2", "3"]),
    ({"oneOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}]}, ['"a"', '"c"'], ['"b"', '"d"']),
    ({"not": {"enum": ["ab", "b", None, True, 1]}}, ['"a"', '"abc"', '""', "false", "1.5", "[]"], ['"ab"', '"b"', "null", "true", "1"]),
    ({"not": {"required": ["a"]}}, ['{"b": 1}'], ['{"a": 1}', "1"]),
    ({"not": {"not": {"type": "null"}}}, ["null"], ["1"]),
    ({"not": {"anyOf": [{"type": "null"}, {"minLength": 1}]}}, ['""'], ["null", '"a"', "1"]),
    (
        {"if": {"properties": {"a": {"const": 1}}, "required": ["a"]}, "then": {"required": ["b"]}, "else": {"properties": {"b": False}}},
        ['{"a": 1, "b": 2}', '{"a": 2}', "3"],
        ['{"a": 1}', '{"a": 2, "b": 2}'],
    ),
    ({"if": {"type": "null"}}, ["null", "1"], []),
    ({"dependentRequired": {"a": ["b"]}}, ['{"b": 1, "a": 1}', '{"b": 1}', "1"], ['{"a": 1}']),
    ({"dependentSchemas": {"a": {"maxProperties": 1}}}, ['{"a": 1}', '{"b": 1, "c": 1}'], ['{"a": 1, "b": 1}']),
    ({"$schema": OLD, "dependencies": {"a": ["b"], "c": False}}, ['{"b": 1, "a": 1}', "{}"], ['{"a": 1}', '{"c": 1}']),
    ({"properties": {"a": {}}, "unevaluatedProperties": False}, ['{"a": 1}'], ['{"b": 1}']),
    (
        {"$ref": "#/$defs/a", "properties": {"b": {}}, "unevaluatedProperties": False, "$defs": {"a": {"properties": {"a": {}}}}},
        ['{"b": 1, "a": 1}', '{"a": 1}'],
        ['{"c": 1}'],
    ),
    ({"prefixItems": [{}], "unevaluatedItems": {"type": "null"}}, ["[1, null]"], ["[1, 1]"]),
    ({"propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "null"}}, ['{"a": null}'], ['{"a": 1}', '{"c": null}']),
    ({"propertyNames": {"pattern": "^a"}, "additionalProperties": {"type": "null"}}, ['{"ab": null}'], ['{"ab": 1}', '{"b": null}']),
    ({"propertyNames": {"type": "string"}, "additionalItems": False, "items": {}}, ['{"a": 1}', "[1, 2]"], []),
    ({"$schema": OLD, "items": {"$ref": "#/definitions/a", "minLength": 2}, "definitions": {"a": {"type": "string"}}}, ['["ab"]'], ["[1]"]),
    ({"$ref": "#/$defs/a", "minLength": 2, "$defs": {"a": {"type": "string"}}}, ['"ab"'], ['"a"', "1"]),
    ({"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": {"type": "null"}}}, ["null"], ["1"]),
    ({"$ref": "#/properties/a", "properties": {"a": {"type": "null"}}}, ["null"], ["1", '{"a": null}']),
    ({"properties": {"a": {"$ref": "#"}}, "additionalProperties": False, "type": "object"}, ['{"a": {"a": {}}}'], ['{"a": {"b": {}}}']),
    ({"type": "array", "items": {"anyOf": [{"$ref": "#"}, {"const": 1}]}, "minItems": 1}, ["[1]", "[[1], 1]"], ["[]", "[[]]"]),
    ({"type": "array", "items": {"$ref": "#"}}, ["[]", "[[], [[]]]"], ["[1]"]),
    ({"$id": "https://example.com/a", "items": {"$id": "b", "type": "null"}, "type": "array"}, ["[null]"], ["[1]"]),
    ({"$comment": "x", "nullable": True, "x-own": 1, "default": 3, "deprecated": True, "type": "null"}, ["null"], ["1"]),
    # arrays
    ({"prefixItems": [{"type": "null"}, {"const": 1}], "items": False}, ["[]", "[null]", "[null, 1]"], ["[1]", "[null, 1, 1]"]),
    ({"type": "array", "minItems": 1, "maxItems": 2, "uniqueItems": False}, ["[1]", "[1, 1]"], ["[]", "[1, 1, 1]"]),
    ({"$schema": OLD, "items": [{"type": "null"}], "additionalItems": False}, ["[]", "[null]"], ["[1]", "[null, null]"]),
    # numbers
    ({"exclusiveMinimum": 0, "maximum": 0.5, "type": "number"}, ["0.5", "0.25"], ["0", "0.0", "-0", "0.51"]),
    ({"allOf": [{"exclusiveMinimum": 0}, {"maximum": 0.5}], "type": "number"}, ["0.5", "0.25"], ["0", "0.0"]),
    ({"minimum": -0.5, "exclusiveMaximum": 0, "type": "number"}, ["-0.5", "-0.25"], ["0", "-0", "-0.0"]),
    ({"exclusiveMinimum": 1, "exclusiveMaximum": 3, "type": "integer"}, ["2"], ["1", "3"]),
    ({"minimum": 1.5, "maximum": 2.5, "type": "integer"}, ["2"], ["1", "3", "2.5"]),
    ({"minimum": -(2**63), "maximum": 2**64, "type": "integer"}, [str(2**53 - 1), "-5"], [str(2**65)]),
    ({"multipleOf": 3, "type": "integer"}, ["0", "-6", "12"], ["1", "4"]),
    ({"multipleOf": 0.5, "minimum": 1, "type": "number"}, ["1", "1.5"], ["0.5", "1.25"]),
    ({"const": 1.0}, ["1"], ["2", "true"]),
    ({"enum": [0, False]}, ["0", "false"], ["true", "1"]),
    ({"$schema": OLDEST, "type": "integer", "minimum": 1, "exclusiveMinimum": True}, ["2"], ["1"]),
    # strings
    ({"minLength": 2, "maxLength": 2, "type": "string"}, ['"ab"', '"😀é"', '"\\n\\""'], ['"a"', '"abc"', '"😀"']),
    ({"pattern": "b"}, ['"abc"', "1"], ['"ac"']),
    ({"pattern": "^a|b$"}, ['"ax"', '"xb"'], ['"xa"', '"bx"']),
    ({"pattern": "^(a|b$)", "maxLength": 2}, ['"ax"', '"b"'], ['"bx"', '"axx"']),
    ({"pattern": "^\\w\\d\\s.$"}, ['"a1 x"'], ['"é1 x"', '"a١ x"', '"a1 \\n"', '"a1 \\r"', '"a1 x\\n"']),
    ({"pattern": "^[^\\W\\d]$"}, ['"a"', '"_"'], ['"1"', '"é"']),
    ({"pattern": "^[a&&b]$"}, ['"a"', '"&"'], ['"c"']),
    ({"pattern": "^\\ud83d\\ude00{2}$"}, ['"😀😀"'], ['"😀"']),
    ({"const": "a\n\"\\é😀"}, ['"a\\n\\"\\\\é😀"'], ['"a"']),
    ({"enum": ["a", {"b": [1, None]}]}, ['"a"', '{"b": [1, null]}'], ['{"b": [1]}', '{"b": [1, null], "c": 1}']),
    # formats
    ({"format": "date"}, ['"2024-02-29"', '"2000-02-29"', "3"], ['"2023-02-29"', '"1900-02-29"', '"2024-04-31"', '"0000-01-01"']),
    ({"format": "time"}, ['"23:59:59Z"', '"00:00:00.5+01:30"'], ['"24:00:00Z"', '"12:00:00"', '"23:59:60Z"']),
    ({"format": "date-time"}, ['"2024-02-29T00:00:00Z"'], ['"2023-02-29T00:00:00Z"', '"2024-02-29 00:00:00Z"']),
    ({"format": "email"}, ['"a.b+c@example.com"'], ['"a"', '"a..b@example.com"', '".a@b"', '"a@-b"']),
    ({"format": "hostname"}, ['"a-b.example"', '"' + "a" * 63 + '"'], ['"-a"', '"a."', '"xn--a"', '"' + "a" * 64 + '"']),
    ({"format": "hostname"}, ['"' + "a." * 126 + 'a"'], ['"' + "a." * 127 + 'a"']),
    ({"format": "uuid"}, ['"12345678-1234-1234-1234-123456789abc"'], ['"12345678"']),
    ({"type": "integer", "format": "int32"}, ["2147483647", "-2147483648"], ["2147483648", "-2147483649"]),
    ({"type": ["integer", "null"], "format": "int32", "maximum": 5}, ["5", "null"], ["6", "-2147483649"]),
    ({"type": "integer", "format": "int64", "minimum": 0}, ["0", "9007199254740991"], ["-1", "1.5"]),
    ({"type": "number", "format": "double"}, ["1.5", "2"], ['"1.5"']),
    ({"type": "string", "format": "password"}, ['"any"', '""'], ["1"]),
    ({"format": "date", "pattern": "^2"}, ['"2024-01-01"'], ['"1999-01-01"', '"2"']),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "accepted", "rejected"), ENFORCED, ids=[str(schema)[:60] for schema, _, _ in ENFORCED])
def test_enforced(schema: Any, accepted: list[str], rejected: list[str]) -> None:
    grammar = Grammar(schema)
    assert [text for text in accepted if not grammar.accepts(text)] == []
    assert [text for text in rejected if grammar.accepts(text)] == []


def test_properties_come_in_the_order_of_the_schema() -> None:
    grammar = Grammar({"anyOf": [{"required": ["b"]}], "required": ["c"], "properties": {"b": {}, "a": {}}})
    assert grammar.accepts('{"b": 1, "a": 1, "c": 1, "d": 1}')
    assert not grammar.accepts('{"a": 1, "b": 1, "c": 1}')


def test_the_schema_given_is_not_changed() -> None:
    schema = {"properties": {"a": {"minimum": 1.0}}, "$defs": {"a": {}}, "$ref": "#/$defs/a"}
    checked(schema)
    assert schema == {"properties": {"a": {"minimum": 1.0}}, "$defs": {"a": {}}, "$ref": "#/$defs/a"}
