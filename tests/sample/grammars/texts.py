"""Texts under the grammar of a schema, byte by byte: which are accepted, and random ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from random import Random
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from redraft.sample.grammars import formats
from redraft.sample.grammars.json_schema import COMPILED_AS, LIMITS, checked

END = 256
CLOSING = b'"}]'
SIGNS = b'",:{}[]0123456789.-eE+ '


class Bytes:
    """A tokenizer whose tokens are the bytes."""

    eos_token_id, bos_token_id, special_token_ids = END, None, (END,)
    tokens = (*tuple(bytes([i]) for i in range(256)), b"<end>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(Bytes()), slices=[])


class Grammar:
    """The grammar of a schema. Raises InvalidInput for a schema that is refused."""

    def __init__(self, schema: Any) -> None:
        compiled = json.dumps(checked(schema))
        grammar = LLMatcher.grammar_from_json_schema(compiled, overrides=COMPILED_AS)  # type: ignore[arg-type]
        self.start = LLMatcher(tokenizer(), grammar, log_level=0, limits=LIMITS)
        assert not self.start.is_error(), self.start.get_error()

    def accepts(self, text: str) -> bool:
        matcher, tokens = self.start.deep_copy(), list(text.encode())
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    def accepts_value(self, value: Any) -> bool:
        return any(self.accepts(json.dumps(value, ensure_ascii=escaped)) for escaped in (False, True))

    def walk(self, rng: Random, soft: int = 60, hard: int = 600) -> str | None:
        """A random text; from `soft` bytes on it ends soon. None if it is still open after `hard` bytes."""
        matcher, text = self.start.deep_copy(), bytearray()
        while len(text) <= hard:
            allowed = [token for token, value in enumerate(matcher.compute_logit_bias()) if value]
            assert allowed and not matcher.is_error(), (bytes(text), matcher.get_error())
            if END in allowed and (allowed == [END] or len(text) > soft or rng.random() < 0.3):
                return text.decode()
            allowed = [token for token in allowed if token != END]
            token = rng.choices(allowed, [weight(token, len(text) > soft) for token in allowed])[0]
            assert matcher.consume_token(token)
            text.append(token)
        return None


def weight(token: int, ending: bool) -> float:
    if ending:
        return 30 if token in CLOSING else 1 if token in b",[{" else 4
    return 6 if token in SIGNS else 3 if token < 128 else 0.4


def judge(schema: Any) -> Validator:
    """Another reader of JSON schemas, with the formats that it knows and that are enforced."""
    known = FormatChecker([])
    enforced = formats.COMPILED | formats.PATTERNS.keys()
    known.checkers = {name: check for name, check in Draft202012Validator.FORMAT_CHECKER.checkers.items() if name in enforced}
    return validator_for(schema, default=Draft202012Validator)(schema, format_checker=known)


def values(text: str) -> Iterator[Any]:
    """The value of a JSON text, as readers understand it that keep the last or the first of names that repeat."""
    yield json.loads(text)
    yield json.loads(text, object_pairs_hook=lambda pairs: dict(reversed(pairs)))
