"""Compiles grammars for a vocabulary with llguidance, within bounds, and keeps the latest."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from redraft.config import Grammar
from redraft.errors import InvalidInput, shown

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from redraft.sample.processors.processor import Vocabulary

T = TypeVar("T")

STACKS = threading.Lock()  # for the size of the stacks of new threads, which all threads share
STACK = 1 << 29  # bytes; only what is used takes memory
KEPT = 64  # compiled grammars of one vocabulary
MAX_TEXT = 1 << 18  # characters of a grammar
MAX_CHOICES = 4096
FORCED = 4096  # characters of a text that the grammar forces, which are looked at
INLINED = re.compile(r"(?m)^\s*\?start\s*:")  # a first rule in Lark's form that the library's test of the form does not know
ATTRIBUTES = re.compile(r"(?m)^\s*[?!]?\w+\s*\[([^\]]*)\]\s*:")  # of a rule in Lark's form
WITHOUT_EFFECT = re.compile(r"\b(temperature|capture)\b")
MAX_WHY = 200  # characters of the library's own explanation


class Compiler:
    """For one vocabulary. Threads may share it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._made: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, grammar: Grammar, *, anew: bool = False) -> LLMatcher:
        """The state at the begin of a text. InvalidInput says what is wrong with the grammar. anew: with a lexer of its own; others share
        one, which grows with their texts and fails once it is full."""
        with self._lock:
            made = None if anew else self._made.get(grammar)
        if made is None:
            made = self._compiled(grammar)  # without the lock, because others need not wait for it
        with self._lock:
            self._made[grammar] = made
            self._made.move_to_end(grammar)
            while len(self._made) > KEPT:
                self._made.popitem(last=False)
            return made.deep_copy()

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        made = _deep(partial(self._from, _source(grammar)))
        if made.is_error() or (first := _tried(made)).is_error():
            raise _wrong(grammar, first_line((made if made.is_error() else first).get_error()))
        return made

    def _from(self, source: str) -> LLMatcher:
        from llguidance import LLMatcher

        from redraft.sample.grammars.form import LIMITS

        return LLMatcher(self._words, source, log_level=0, limits=LIMITS)

    @cached_property
    def _words(self) -> LLTokenizer:
        import llguidance

        words = self.vocabulary
        if words.bytes_of is None:
            raise InvalidInput("structured_outputs: needs a model with a tokenizer")
        if not words.eos:
            raise InvalidInput("structured_outputs: needs a model with an end-of-text token")
        wrapped = llguidance.TokenizerWrapper(_Words(words))
        return llguidance.LLTokenizer(wrapped, n_vocab=words.size, eos_token=sorted(words.eos))


def _deep(task: Callable[[], T]) -> T:
    """What `task` returns, in a thread with a large stack: the library recurses as deep as the rules of a grammar refer to each other."""
    with STACKS:
        before = threading.stack_size(STACK)
        try:
            thread = ThreadPoolExecutor(1, "redraft-deep")
            found = thread.submit(task)
        finally:
            threading.stack_size(before)
    with thread:
        return found.result()


class _Words:
    """A vocabulary as llguidance reads it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        assert vocabulary.bytes_of is not None
        self.eos_token_id, self.bos_token_id = min(vocabulary.eos), None
        self.tokens = [vocabulary.bytes_of(token) for token in range(vocabulary.size)]
        self.special_token_ids = sorted(vocabulary.special | vocabulary.eos)
        self._encode = vocabulary.plain

    def __call__(self, text: bytes | str) -> list[int]:
        """The first tokens of a text. All that the grammar forces is asked for at each row, which only needs to know how it begins."""
        assert self._encode is not None
        return self._encode(text[:FORCED] if isinstance(text, str) else text[:FORCED].decode(errors="ignore"))


def _tried(made: LLMatcher) -> LLMatcher:
    """A copy that went a token on and back again, which shows whether a text can begin, and whether drafts can be taken back."""
    first = made.deep_copy()
    bits = np.unpackbits(np.frombuffer(first.compute_bitmask(), np.uint8), bitorder="little")
    if not first.is_error():
        first.consume_token(int(bits.argmax()))
        first.rollback(1)
    return first


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's form."""
    from llguidance import LLMatcher

    from redraft.sample.grammars.form import one_of
    from redraft.sample.grammars.json_schema import COMPILED_AS, checked

    kind, text = grammar
    if len(text) > MAX_TEXT:
        raise InvalidInput(f"structured_outputs.{kind} has {len(text)} characters: at most {MAX_TEXT} are allowed")
    made: str
    if kind in ("json", "json_object"):
        schema: Any = {"type": "object"} if kind == "json_object" else checked(json.loads(text))
        made = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=COMPILED_AS)  # type: ignore[arg-type]
    elif kind == "regex":
        made = LLMatcher.grammar_from_regex(text)
    elif kind == "choice":
        choices = json.loads(text)
        if len(choices) > MAX_CHOICES:
            raise InvalidInput(f"structured_outputs.choice has {len(choices)} texts: at most {MAX_CHOICES} are allowed")
        made = LLMatcher.grammar_from_lark(f"start: {one_of(choices)}")
    else:
        made = LLMatcher.grammar_from_lark(_lark(grammar))
    return made


def _lark(grammar: Grammar) -> str:
    """A grammar of clients in Lark's form; GBNF is translated."""
    from llguidance.gbnf_to_lark import any_to_lark

    if found := next((one for head in ATTRIBUTES.findall(grammar.text) if (one := WITHOUT_EFFECT.search(head))), None):
        raise _wrong(grammar, f"{found[1]}: rules have no such attribute here")
    if INLINED.search(grammar.text):
        return grammar.text
    try:
        return str(any_to_lark(grammar.text))
    except Exception as error:  # the translation raises many types
        raise _wrong(grammar, str(error)) from None


def _wrong(grammar: Grammar, why: str) -> InvalidInput:
    return InvalidInput(f"structured_outputs.{grammar.kind} = {shown(grammar.text)}: {why}")


def first_line(error: str) -> str:
    """The begin of an error, which also holds the whole grammar."""
    if "NoExtensionBias" in error:
        return "no text follows it"
    lines = [line.strip()[:MAX_WHY] for line in error.splitlines() if line.strip()] or ["not a grammar"]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
