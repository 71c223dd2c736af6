"""Random JSON schemas of all keywords that are enforced, and random values of which some are valid."""

from __future__ import annotations

from random import Random
from typing import Any

NAMES = ["a", "b", "ab", "x-y", "é", "n\n", 'q"', "😀", "", "1"]
PATTERNS = [
    "a", "^a", "b$", "^a|b$", "^[ab]+$", "^(a|b){1,3}$", r"\d", r"^\d{2,4}$", r"^\w+$", r"\W", r"^\S*$", "^.$", "^[^a]*$", "x?",
    "^(^a|b$)$", "(a|^b)", "^$", r"^\D+$", r"^[\w.-]+@x$", "é", "😀", r"^[^\s]+$", r"^\s", r"\.", "^(?:a{1,3}b?){2}$", r"[\s\S]{2}",
]  # fmt: skip
FORMATS = ["date", "date-time", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"]
NUMBERS = [0, 1, -1, 2, 5, 10, 0.5, -0.5, 0.1, 0.3, 1.5, -1.5, 0.25, 100, 99.99, 1e-3, 1e10, -7, 3, 1e-7, 2**53 - 1, 2.0, -0.0, 0.999]
CONSTANTS = [None, True, False, 0, 1, 1.0, -1, 0.5, "a", "ab", "b", "", [], [1], {}, {"a": 1}, {"b": None, "a": "x"}, 'é\n"', 2, 3, 10, "1"]
TYPES: list[Any] = [
    "null", "boolean", "integer", "number", "string", "array", "object", "object", "number", "string",
    ["string", "null"], ["integer", "string"], ["array", "object"], ["object", "null"], ["number", "boolean"],
]  # fmt: skip


class Schemas:
    """One random schema after the other."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.references: list[str] = []

    def root(self) -> dict[str, Any]:
        definitions = self.rng.choice([(), ("d0", "d1", "d 2/~")])
        self.references = ["#/$defs/" + name.replace("~", "~0").replace("/", "~1").replace(" ", "%20") for name in definitions]
        made = self.schema(3)
        if definitions:
            made["$defs"] = {name: self.schema(2) for name in definitions}
        return made

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def inner(self, depth: int) -> Any:
        return self.rng.choice([True, False, {}]) if self.chance(0.08) else self.schema(depth - 1)

    def several(self, depth: int, most: int) -> list[Any]:
        return [self.inner(depth) for _ in range(self.rng.randint(1, most))]

    def schema(self, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if self.chance(0.7):
            made["type"] = self.rng.choice(TYPES)
        types = made.get("type", ())
        for part, of in (("number", self.number), ("string", self.string), ("array", self.array), ("object", self.object)):
            meant = part in types or (part == "number" and "integer" in types)
            if self.chance(0.75 if meant else 0.08):
                of(made, depth)
        self.any(made, depth)
        keys = list(made)
        self.rng.shuffle(keys)
        return {key: made[key] for key in keys}

    def plain(self, depth: int) -> Any:
        """A schema that often has a negation."""
        kind = self.rng.randrange(6)
        if kind == 0:
            return {"required": self.rng.sample(NAMES[:4], self.rng.randint(0, 2))}
        if kind == 1:
            return {
                "properties": {self.rng.choice(NAMES[:4]): {"const": self.rng.choice(CONSTANTS)}},
                "required": [self.rng.choice(NAMES[:3])],
            }
        if kind == 2:
            return {"enum": self.rng.sample([one for one in CONSTANTS if not isinstance(one, (list, dict))], 3)}
        if kind == 3:
            return {self.rng.choice(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]): self.rng.choice(NUMBERS)}
        if kind == 4:
            return {self.rng.choice(["minLength", "maxLength", "minItems", "maxItems"]): self.rng.randint(0, 3)}
        return self.inner(depth)

    def number(self, made: dict[str, Any], depth: int) -> None:
        for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if self.chance(0.35):
                made[key] = self.rng.choice(NUMBERS)
        if self.chance(0.2):
            made["multipleOf"] = self.rng.choice([1, 2, 3, 7, 0.5, 10, 1000])

    def string(self, made: dict[str, Any], depth: int) -> None:
        if self.chance(0.3):
            made["minLength"] = self.rng.choice([0, 1, 2, 5])
        if self.chance(0.3):
            made["maxLength"] = self.rng.choice([0, 1, 3, 8, 40])
        if self.chance(0.5):
            made["pattern"] = self.rng.choice(PATTERNS)
        if self.chance(0.15):
            made["format"] = self.rng.choice(FORMATS)

    def array(self, made: dict[str, Any], depth: int) -> None:
        if depth and self.chance(0.7):
            made["items"] = self.inner(depth)
        if depth and self.chance(0.35):
            made["prefixItems"] = self.several(depth, 3)
        if self.chance(0.35):
            made["minItems"] = self.rng.randint(0, 3)
        if self.chance(0.35):
            made["maxItems"] = self.rng.randint(0, 4)

    def object(self, made: dict[str, Any], depth: int) -> None:
        if depth and self.chance(0.8):
            made["properties"] = {self.rng.choice(NAMES): self.inner(depth) for _ in range(self.rng.randint(0, 3))}
        if depth and self.chance(0.25):
            made["patternProperties"] = {self.rng.choice(PATTERNS): self.inner(depth) for _ in range(self.rng.randint(1, 2))}
        if depth and self.chance(0.5):
            made["additionalProperties"] = self.rng.choice([False, True, self.inner(depth)])
        if self.chance(0.4):
            made["required"] = self.rng.sample(NAMES, self.rng.randint(0, 2))
        if self.chance(0.15):
            made["minProperties"] = self.rng.randint(0, 3)
        if self.chance(0.15):
            made["maxProperties"] = self.rng.randint(0, 4)

    def any(self, made: dict[str, Any], depth: int) -> None:
        if self.chance(0.06):
            made["const"] = self.rng.choice(CONSTANTS)
        if self.chance(0.08):
            made["enum"] = self.rng.sample(CONSTANTS, self.rng.randint(1, 6))
        if not depth:
            return
        for key, share, most in (("allOf", 0.12, 2), ("anyOf", 0.14, 3), ("oneOf", 0.08, 3)):
            if self.chance(share):
                made[key] = self.several(depth, most)
        if self.chance(0.1):
            made["oneOf"] = [self.plain(depth) for _ in range(2)]
        if self.chance(0.1):
            made["not"] = self.plain(depth)
        if self.chance(0.08):
            made["if"] = self.plain(depth)
            made |= {key: self.inner(depth) for key in ("then", "else") if self.chance(0.7)}
        if self.chance(0.07):
            made["dependentRequired"] = {self.rng.choice(NAMES): self.rng.sample(NAMES, self.rng.randint(0, 2))}
        if self.chance(0.07):
            made["dependentSchemas"] = {self.rng.choice(NAMES): self.inner(depth)}
        if self.chance(0.06):
            made["propertyNames"] = self.rng.choice(
                [{"pattern": self.rng.choice(PATTERNS)}, {"enum": [*self.rng.sample(NAMES, 3), 1]}, False]
            )
        if self.chance(0.06):
            made["unevaluatedProperties"] = self.rng.choice([False, {"type": "string"}])
        if self.references and self.chance(0.12):
            made["$ref"] = self.rng.choice(self.references)


def value(rng: Random, depth: int = 2) -> Any:
    kind = rng.random() if depth else 1
    if kind < 0.25:
        return [value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    if kind < 0.6:
        return {rng.choice(NAMES): value(rng, depth - 1) for _ in range(rng.randint(0, 3))}
    return rng.choice([*CONSTANTS, *NUMBERS, "2024-02-30", "a@b", "10.0.0.1", "aa", "bb", "12", "é", "😀", "a\n", "b b"])
