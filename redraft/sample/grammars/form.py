"""How llguidance compiles a schema, and what it says of one that it cannot compile."""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from redraft.errors import shown

__all__ = ["COMPILED_AS", "LIMITS", "one_of", "problem"]

# A character has one spelling: else a name with \u escapes would pass as another name.
COMPILED_AS: dict[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}
# As many states take up to 10 MB of each grammar that is kept.
LIMITS = LLParserLimits(
    step_lexer_fuel=1_000_000, step_max_items=10_000, max_lexer_states=20_000, max_grammar_size=200_000, verbose_errors=False
)

COMBINED = "the schema is too large once its parts are combined"
PROBLEMS = {  # what llguidance says, and what an error says
    "Unsatisfiable schema": "no value can satisfy the schema",
    "circular references with sibling keys": "a $ref that leads back to itself beside other keywords is not supported",
    "not disjoint": "patternProperties: a name could match two patterns, which is not supported",
    "min/maxProperties only": "minProperties and maxProperties are not enforced beside optional properties of another part of an allOf",
    "Failed to generate regex for": "no value can satisfy the schema",
    "if regex is empty": "a pattern beside lengths or other patterns is too complex",
    "too large": COMBINED,
    "too big": COMBINED,
    "stack level": COMBINED,
    "panic": COMBINED,
}


def problem(schema: dict[str, Any]) -> str:
    """Why a schema cannot be compiled; empty if it can."""
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=COMPILED_AS)  # type: ignore[arg-type]
    message = LLMatcher.validate_grammar(grammar, limits=LIMITS)
    known = next((ours for theirs, ours in PROBLEMS.items() if theirs in message), "")
    return known or (message and f"cannot be compiled: {shown(message.splitlines()[0])}")


def one_of(texts: list[str]) -> str:
    """The body of a rule of Lark: one of these texts. They are a terminal, because a rule has at most 2000 alternatives."""
    return "ONE_OF\nONE_OF: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
