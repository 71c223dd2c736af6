"""Reads a JSON schema and writes it anew with the keywords that llguidance enforces.

The keywords of types come first, as llguidance combines a schema in the order of its keywords. References become numbered definitions.
"""

from __future__ import annotations

import math
from typing import Any
from urllib.parse import unquote

from redraft.errors import InvalidInput, did_you_mean, shown
from redraft.sample.grammars import formats, numbers
from redraft.sample.grammars.form import problem
from redraft.sample.grammars.kinds import TYPES, Sorter, apart
from redraft.sample.grammars.negation import negated
from redraft.sample.grammars.pattern import Whole, whole
from redraft.sample.grammars.places import refused, within
from redraft.sample.grammars.rewriting import rewritten

__all__ = ["MAX_DEPTH", "Reader"]

MAX_DEPTH = 64  # schemas within each other
MAX_SCHEMAS = 2000  # schemas within a schema
MAX_PROPERTIES = 500  # of one object
MAX_PAIRS = 2000  # of patterns in patternProperties of one object, which must not match the same names; in all objects
MAX_VALUES = 2000  # in all enum and const together
MAX_ITEMS = 100_000  # minItems, maxItems, minProperties, maxProperties
MAX_CHARACTERS = 2**31 - 1  # minLength and maxLength
MAX_COUNTED = 50_000  # minLength or maxLength, times the size of a counted group in a pattern beside it
MAX_OPTIONAL = 64  # properties of which at least or at most one must be there

DRAFTS = {
    "json-schema.org/draft/2020-12/schema": 2020,
    "json-schema.org/draft/2019-09/schema": 2019,
    "json-schema.org/draft-07/schema": 7,
    "json-schema.org/draft-06/schema": 6,
    "json-schema.org/draft-04/schema": 4,
}

NOT_ENFORCED = frozenset(
    {
        "$dynamicRef", "$recursiveRef", "additionalItems", "contains", "disallow", "extends", "maxContains", "minContains", "propertyNames",
        "unevaluatedItems", "unevaluatedProperties", "uniqueItems", "x-guidance",
    }
)  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {  # values with which these change nothing
    "additionalItems": (True, {}),
    "propertyNames": (True, {}, {"type": "string"}),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "uniqueItems": (False,),
}


class Reader:
    """Reads one schema, whose references are within `root`. definitions: what it refers to, by the number in the result."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self.draft = 2020
        self.definitions: dict[str, Any] = {}
        self.numbers: dict[str, str] = {}  # of each place that is referred to
        self.in_place: dict[str, set[str]] = {}  # the definitions that apply to the same value as a definition
        self.embedded = 0  # schemas with their own address around the one that is read
        self.schemas = self.values = self.pairs = 0
        self.step = 1  # the least common multiple of all multipleOf
        self.sorter = Sorter(lambda target: self.resolve(target, "#")[0])

    # Structure

    def schema(self, value: Any, place: str, depth: int, owner: str = "") -> Any:
        """A schema in the form that is compiled. owner: the definition whose value this schema applies to, empty for none."""
        if isinstance(value, bool):
            return value
        if not isinstance(value, dict):
            raise refused(place, f"{shown(value)} is no schema; an object or a boolean is allowed")
        self.schemas += 1
        if self.schemas > MAX_SCHEMAS:
            raise refused(place, f"is one of more than {MAX_SCHEMAS} schemas, which is not allowed")
        if depth > MAX_DEPTH:
            raise refused(place, f"is within more than {MAX_DEPTH} schemas, which is not allowed")
        embedded = self.address(value, place)
        self.embedded += embedded
        found = self.keywords(value, place, depth, owner)
        self.embedded -= embedded
        return found

    def address(self, value: dict[str, Any], place: str) -> bool:
        """Reads $schema. Returns whether the schema has its own address, within another schema."""
        if "$schema" in value:
            named, at = value["$schema"], within(place, "$schema")
            draft = DRAFTS.get(named.split("://")[-1].removesuffix("#")) if isinstance(named, str) else None
            if draft is None:
                raise refused(at, f"{shown(named)} is not supported; drafts 4, 6, 7, 2019-09 and 2020-12 are")
            if place != "#" and draft != self.draft:
                raise refused(at, "another draft than that of the whole schema is not supported")
            self.draft = draft
            self.sorter.reference_alone = draft < 2019
        own = value.get(self.key_of_address)
        return place != "#" and isinstance(own, str) and not (self.draft < 2019 and own.startswith("#"))

    @property
    def key_of_address(self) -> str:
        return "id" if self.draft == 4 else "$id"

    def keywords(self, value: dict[str, Any], place: str, depth: int, owner: str) -> dict[str, Any]:
        value = rewritten(value, lambda target: self.resolve(target, place)[0])
        self.refuse_not_enforced(value, place)
        found: dict[str, Any] = {}
        if "type" in value:
            found["type"] = self.type(value["type"], within(place, "type"))
        self.array(value, place, depth, found)
        self.object(value, place, depth, found)
        self.number(value, place, found)
        every = self.string(value, place, found)
        if "const" in value:
            found["const"] = self.constant(value["const"], within(place, "const"))
        if "enum" in value:
            found["enum"] = self.constant(self.filled(value, "enum", place), within(place, "enum"))
        if "$ref" in value:
            found["$ref"] = self.reference(value["$ref"], within(place, "$ref"), depth, owner)
        every += self.options(value, "allOf", place, depth, owner)
        if "not" in value:
            self.schema(value["not"], within(place, "not"), depth + 1, owner)
            every.append(self.denied(value["not"], within(place, "not"), depth, owner))
        some = [self.options(value, "anyOf", place, depth, owner), self.one_of(value, place, depth, owner)]
        some += [self.conditional(value, place, depth, owner), *self.dependent(value, place, depth, owner)]
        some = [options for options in some if options]
        if some:
            found["anyOf"] = some.pop(0)
        every += [{"anyOf": options} for options in some]
        if every:
            found["allOf"] = every
        return found

    def refuse_not_enforced(self, value: dict[str, Any], place: str) -> None:
        for key in sorted(NOT_ENFORCED & value.keys()):
            neutral = any(type(one) is type(value[key]) and one == value[key] for one in NEUTRAL.get(key, ()))
            if key == "additionalItems" and "items" in value:  # if all items are alike, none is additional
                neutral = neutral or not isinstance(value["items"], list) or self.draft < 2020
            if not neutral:
                raise refused(within(place, key), "this keyword is not enforced")

    def filled(self, value: dict[str, Any], key: str, place: str) -> list[Any]:
        given: Any = value[key]
        if not isinstance(given, list) or not given:
            raise refused(within(place, key), f"{shown(given)} is not allowed; a list that is not empty is")
        return given

    def options(self, value: dict[str, Any], key: str, place: str, depth: int, owner: str) -> list[Any]:
        if key not in value:
            return []
        at = within(place, key)
        return [self.schema(one, within(at, i), depth + 1, owner) for i, one in enumerate(self.filled(value, key, place))]

    # Alternatives

    def negated(self, value: Any, place: str, depth: int, owner: str) -> Any:
        """What a schema that was read before does not match, None if it cannot be said."""
        found = negated(value, lambda target: self.resolve(target, place)[0], reference_alone=self.draft < 2019)
        if found is None:
            return None
        kept, self.draft = self.draft, 2020
        read = self.schema(found, place, depth + 1, owner)
        self.draft = kept
        return read

    def denied(self, value: Any, place: str, depth: int, owner: str) -> Any:
        found = self.negated(value, place, depth, owner)
        if found is None:
            raise refused(place, "that a value does not match this schema is not enforced")
        return found

    def one_of(self, value: dict[str, Any], place: str, depth: int, owner: str) -> list[Any]:
        """Options for a value that matches exactly one: each excludes those that a value could match as well."""
        read = self.options(value, "oneOf", place, depth, owner)
        place = within(place, "oneOf")
        kinds = [self.sorter.kinds(option) for option in value.get("oneOf", ())]
        others: dict[int, Any] = {}
        found = []
        for i, option in enumerate(read):
            common = [j for j in range(len(read)) if j != i and not apart(kinds[i], kinds[j])]
            for j in common:
                if j not in others:
                    others[j] = self.negated(value["oneOf"][j], within(place, j), depth, owner)
                if others[j] is None:
                    both = f"both option {min(i, j)} and option {max(i, j)}"
                    raise refused(place, f"a value could match {both}, so exactly one is not enforced; anyOf would be")
            found.append({"allOf": [option, *(others[j] for j in common)]} if common else option)
        return found

    def conditional(self, value: dict[str, Any], place: str, depth: int, owner: str) -> list[Any]:
        """Options for if, then and else."""
        read = {key: self.schema(value[key], within(place, key), depth + 1, owner) for key in ("if", "then", "else") if key in value}
        if "if" not in read:
            if read:
                raise refused(within(place, next(iter(read))), "has no effect without if, which is not allowed")
            return []
        if len(read) == 1:
            return []
        denied = self.denied(value["if"], within(place, "if"), depth, owner)
        return [{"allOf": [read["if"], read.get("then", True)]}, {"allOf": [denied, read.get("else", True)]}]

    def dependent(self, value: dict[str, Any], place: str, depth: int, owner: str) -> list[list[Any]]:
        """Options for each property on which others depend: that it is absent, or what follows from it."""
        found: list[list[Any]] = []
        for key in ("dependencies", "dependentRequired", "dependentSchemas"):
            given, at = self.schemas_by_name(value, key, place) if key in value else {}, within(place, key)
            for name, one in given.items():
                if isinstance(one, list) != (key == "dependentRequired") and key != "dependencies":
                    raise refused(
                        within(at, name), f"{shown(one)} is not allowed; a {'list' if key == 'dependentRequired' else 'schema'} is"
                    )
                then = {"required": one} if isinstance(one, list) else one
                absent = {"properties": {self.spelled(name, at): False}}
                found.append([absent, self.schema(then, within(at, name), depth + 1, owner)])
        return found

    # References

    def reference(self, target: Any, place: str, depth: int, owner: str) -> str:
        value, target = self.resolve(target, place)
        known = target in self.numbers
        number = self.numbers.setdefault(target, str(len(self.numbers)))
        self.in_place.setdefault(owner, set()).add(number)
        if not known:
            self.definitions[number] = None  # keeps the order
            self.definitions[number] = self.schema(value, target, depth + 1, number)
        return f"#/$defs/{number}"

    def resolve(self, target: Any, place: str) -> tuple[Any, str]:
        """The value at a reference, and its place."""
        if not isinstance(target, str):
            raise refused(place, f"{shown(target)} is no reference; a string is allowed")
        if self.embedded:
            raise refused(place, f"a reference in a schema with its own {self.key_of_address} within a schema is not supported")
        if target != "#" and not target.startswith("#/"):
            raise refused(place, f"{shown(target)} is not supported; references such as #/$defs/name are")
        value, found = self.root, "#"
        for part in unquote(target[1:]).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if found != "#" and isinstance(value, dict) and isinstance(value.get(self.key_of_address), str):
                raise refused(place, f"{shown(target)} goes through a schema with its own {self.key_of_address}, which is not supported")
            if isinstance(value, list) and key.isascii() and key.isdigit() and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, dict) and key in value:
                value = value[key]
            else:
                raise refused(place, f"{shown(target)} refers to nothing")
            found = within(found, key)
        return value, found

    def refuse_endless(self) -> None:
        """Refuses definitions that are defined by themselves, for the same value."""
        done: dict[str, bool] = {}

        def ends(number: str) -> bool:
            if number not in done:
                done[number] = False
                done[number] = all(map(ends, self.in_place.get(number, ())))
            return done[number]

        for place, number in self.numbers.items():
            if not ends(number):
                raise refused(place, "is defined by itself")

    # Keywords of one type of value

    def type(self, named: Any, place: str) -> Any:
        names = [named] if isinstance(named, str) else named
        if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
            raise refused(place, f"{shown(named)} is not allowed; a type or a list of different types is")
        for name in names:
            if name not in TYPES:
                raise refused(place, f"{shown(name)} is no type; {did_you_mean(str(name), TYPES)}")
        return named if isinstance(named, str) else [name for name in TYPES if name in names]

    def counts(self, value: dict[str, Any], keys: tuple[str, str], place: str, most: int, found: dict[str, Any]) -> None:
        for key in keys:
            if key in value:
                given = value[key]
                if not numbers.is_number(given) or given != int(given) or not 0 <= given <= most:
                    raise refused(within(place, key), f"{shown(given)} is not allowed; 0 to {most} are")
                found[key] = int(given)

    def array(self, value: dict[str, Any], place: str, depth: int, found: dict[str, Any]) -> None:
        first, rest = "prefixItems", "items"
        if self.draft < 2020:
            if first in value:
                raise refused(within(place, first), "this keyword is of draft 2020-12, and $schema names an older one")
            if isinstance(value.get("items"), list):
                first, rest = "items", "additionalItems"
        if first in value:
            at = within(place, first)
            found["prefixItems"] = [self.schema(one, within(at, i), depth + 1) for i, one in enumerate(self.filled(value, first, place))]
        if rest in value:
            if isinstance(value[rest], list):
                raise refused(within(place, rest), "a list is not allowed in draft 2020-12; prefixItems is, or a $schema of an older draft")
            found["items"] = self.schema(value[rest], within(place, rest), depth + 1)
        self.counts(value, ("minItems", "maxItems"), place, MAX_ITEMS, found)

    def object(self, value: dict[str, Any], place: str, depth: int, found: dict[str, Any]) -> None:
        if "properties" in value:
            given, at = self.schemas_by_name(value, "properties", place), within(place, "properties")
            found["properties"] = {
                self.spelled(name, within(at, name)): self.schema(one, within(at, name), depth + 1) for name, one in given.items()
            }
        if "patternProperties" in value:
            found["patternProperties"] = self.pattern_properties(value, place, depth)
        if "additionalProperties" in value:
            found["additionalProperties"] = self.schema(value["additionalProperties"], within(place, "additionalProperties"), depth + 1)
        if "required" in value:
            names, at = value["required"], within(place, "required")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
                raise refused(at, f"{shown(names)} is not allowed; a list of different strings is")
            if len(names) > MAX_PROPERTIES:
                raise refused(at, f"has {len(names)} properties; at most {MAX_PROPERTIES} are allowed")
            found["required"] = [self.spelled(name, at) for name in names]
        self.counts(value, ("minProperties", "maxProperties"), place, MAX_ITEMS, found)
        self.refuse_counts(found, place)

    def schemas_by_name(self, value: dict[str, Any], key: str, place: str) -> dict[str, Any]:
        given: Any = value[key]
        if not isinstance(given, dict):
            raise refused(within(place, key), f"{shown(given)} is not allowed; an object of schemas is")
        if len(given) > MAX_PROPERTIES:
            raise refused(within(place, key), f"has {len(given)} properties; at most {MAX_PROPERTIES} are allowed")
        return given

    def pattern_properties(self, value: dict[str, Any], place: str, depth: int) -> dict[str, Any]:
        given, at = self.schemas_by_name(value, "patternProperties", place), within(place, "patternProperties")
        others = value.get("additionalProperties", True)
        self.pairs += math.comb(len(given), 2)
        if self.pairs > MAX_PAIRS:
            raise refused(at, f"makes {self.pairs} pairs of patterns to compare; at most {MAX_PAIRS} are allowed")
        found: dict[str, Any] = {}
        for name, one in given.items():
            narrow, wide = (self.pattern(name, within(at, name), wide).text for wide in (False, True))
            # a name that matches in one dialect only: if other names are free, its value is checked; if there are none, it is none either
            if narrow != wide and not isinstance(others, bool) and others != {}:
                raise refused(within(at, name), "which names match depends on the dialect; then additionalProperties must be true or false")
            found[narrow if others is False else wide] = self.schema(one, within(at, name), depth + 1)
        if len(found) < len(given) or (len(found) > 1 and problem({"type": "object", "patternProperties": dict.fromkeys(found, True)})):
            raise refused(at, "a name could match two patterns, which is not supported")
        return found

    def refuse_counts(self, found: dict[str, Any], place: str) -> None:
        """Refuses numbers of properties that are not enforced, as names could repeat or as there would be too many cases."""
        required = set(found.get("required", ()))
        optional = len(found.get("properties", {}).keys() - required)
        closed = found.get("additionalProperties") is False and "patternProperties" not in found
        if found.get("minProperties", 0) <= len(required):
            found.pop("minProperties", None)
        if closed and found.get("maxProperties", 0) >= len(required) + optional:
            found.pop("maxProperties", None)
        one = len(required) + 1
        for key in ("minProperties", "maxProperties"):
            if key in found and optional and not (closed and found[key] == one and optional <= MAX_OPTIONAL):
                most = f"one of at most {MAX_OPTIONAL} optional ones, with additionalProperties false"
                raise refused(within(place, key), f"{found[key]} is not enforced beside optional properties; at least or at most {most} is")
        if found.get("minProperties", 0) > one:
            least = found["minProperties"]
            raise refused(within(place, "minProperties"), f"{least} is not enforced, as names could repeat; one more than are required is")

    def number(self, value: dict[str, Any], place: str, found: dict[str, Any]) -> None:
        bounds: dict[str, Any] = {key: value[key] for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if key in value}
        if self.draft == 4:
            bounds = self.bounds_of_draft_4(bounds, place)
        for key, given in bounds.items():
            limit = numbers.bound(given, key, within(place, key))
            side, stricter = ("minimum", max) if "inimum" in key else ("maximum", min)
            found[side] = stricter(found[side], limit) if side in found else limit
        if "multipleOf" in value:
            at = within(place, "multipleOf")
            found["multipleOf"] = step = numbers.step(value["multipleOf"], at)
            self.step = math.lcm(self.step, math.ceil(step))
            if self.step > numbers.MAX_STEPS:
                raise refused(at, f"all multipleOf have only {self.step} in common; at most {numbers.MAX_STEPS} is supported")

    def bounds_of_draft_4(self, bounds: dict[str, Any], place: str) -> dict[str, Any]:
        """The bounds as later drafts have them."""
        found = {}
        for side in ("Minimum", "Maximum"):
            exclusive = bounds.get(f"exclusive{side}", False)
            if not isinstance(exclusive, bool):
                raise refused(within(place, f"exclusive{side}"), f"{shown(exclusive)} is not allowed in draft 4; true and false are")
            if side.lower() in bounds:
                found[f"exclusive{side}" if exclusive else side.lower()] = bounds[side.lower()]
        return found

    def string(self, value: dict[str, Any], place: str, found: dict[str, Any]) -> list[Any]:
        """Patterns beyond the first are returned, as schemas that must match as well."""
        self.counts(value, ("minLength", "maxLength"), place, MAX_CHARACTERS, found)
        patterns: list[Whole] = []
        if "pattern" in value:
            patterns.append(self.pattern(value["pattern"], within(place, "pattern")))
        if "format" in value:
            patterns += self.format(value["format"], within(place, "format"), found)
        length = max(found.get("minLength", 0), found.get("maxLength", 0))
        for pattern in patterns:
            if pattern.counted * length > MAX_COUNTED:
                most = MAX_COUNTED // pattern.counted
                raise refused(within(place, "pattern"), f"is too complex beside a length of {length}; at most {most} is supported")
        if patterns:
            found["pattern"] = patterns[0].text
        return [{"pattern": pattern.text} for pattern in patterns[1:]]

    def format(self, given: Any, place: str, found: dict[str, Any]) -> list[Whole]:
        """Patterns for a format; one of numbers becomes bounds."""
        name = given if isinstance(given, str) else ""
        types = {found["type"]} if isinstance(found.get("type"), str) else set(found.get("type", ()))
        if name in formats.COMPILED:
            found["format"] = name
        elif name in formats.PATTERNS:
            if name in formats.LONGEST:
                found["maxLength"] = min(found.get("maxLength", MAX_CHARACTERS), formats.LONGEST[name])
            return [whole(formats.PATTERNS[name])]
        elif name in formats.INTEGERS and types - {"null"} == {"integer"}:
            limit = 1 << formats.INTEGERS[name]
            for key, own, stricter in (("minimum", -limit, max), ("maximum", limit - 1, min)):
                bound = numbers.bound(own, key, place)
                found[key] = stricter(found.get(key, bound), bound)
        elif name not in formats.FREE or not (types and types - {"null"} <= formats.FREE[name]):
            raise refused(place, f"{shown(given)} is not enforced{self.other_formats(name)}")
        return []

    def other_formats(self, name: str) -> str:
        """What an error says of the formats that are enforced."""
        if name in formats.INTEGERS or name in formats.FREE:
            allowed = sorted(formats.FREE.get(name, {"integer"}))
            return f" without the type {' or '.join(allowed)}"
        return f"; {', '.join(sorted({*formats.COMPILED, *formats.PATTERNS, *formats.INTEGERS}))} are"

    def pattern(self, given: Any, place: str, wide: bool = False) -> Whole:
        if not isinstance(given, str):
            raise refused(place, f"{shown(given)} is no pattern; a string is allowed")
        try:
            return whole(given, wide)
        except InvalidInput as error:
            raise refused(place, f"the pattern {error}") from None

    # Values

    def spelled(self, text: str, place: str) -> str:
        """The text, if JSON writes it without \\u escapes."""
        if any((sign < " " and sign not in "\b\f\n\r\t") or sign == "\x7f" for sign in text):
            raise refused(place, f"{shown(text)} has a control character, which is not supported")
        return text

    def constant(self, given: Any, place: str) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise refused(place, f"is one of more than {MAX_VALUES} constants, which is not allowed")
        if isinstance(given, str):
            return self.spelled(given, place)
        if isinstance(given, list):
            return [self.constant(one, within(place, i)) for i, one in enumerate(given)]
        if isinstance(given, dict):
            return {self.spelled(name, place): self.constant(one, within(place, name)) for name, one in given.items()}
        return numbers.number(given, place) if numbers.is_number(given) else given
