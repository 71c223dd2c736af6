"""Which texts the grammars of calls allow, in a vocabulary of bytes and special tokens."""

from __future__ import annotations

import re
from typing import Any

import pytest

from redraft import registry
from redraft.config import Grammar
from redraft.sample.grammars.compiler import Compiler
from redraft.sample.processors.processor import Vocabulary
from redraft.serve.formats import grammar
from redraft.serve.parsers.deepseek import DeepSeek
from redraft.serve.parsers.gpt_oss import HarmonyCalls
from redraft.serve.parsers.grammar import TEXT, Calls, Words, json_rule

NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
SCHEMAS = {"f": NUMBER, "g": {"type": "object", "additionalProperties": False}}
F, G = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
WRONG = '<tool_call>\n{"name": "f", "arguments": {"b": 1}}\n</tool_call>'
THINK, CALL = ("<think>", "</think>"), ("<tool_call>", "</tool_call>")
SPECIAL = [(), CALL, THINK, CALL + THINK]  # marks that are special tokens
MISTRAL, NEW = ("[TOOL_CALLS]",), ("[TOOL_CALLS]", "[ARGS]")
FENCED = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>\n'
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
BARE = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
HARMONY = HarmonyCalls.MARKS
ANALYSIS = "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant"
COMMENTARY = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}'


class Model:
    """Ids 0..255 are bytes, 256 ends a text, then come the special tokens. template: names what its grammars depend on."""

    def __init__(self, special: tuple[str, ...], template: str = "") -> None:
        self.special = {mark: 257 + i for i, mark in enumerate(special)}
        spellings = [bytes([i]) for i in range(256)] + [b"<eos>", *(mark.encode() for mark in special)]
        size, hidden = len(spellings), frozenset({256, *self.special.values()})
        self.compiler = Compiler(Vocabulary(size, frozenset({256}), None, spellings.__getitem__, lambda text: list(text.encode()), hidden))
        self.words = Words(template, self.special)

    def allows(self, source: str, text: str) -> bool:
        matcher = self.compiler.start(Grammar("grammar", source))
        marks = "|".join(map(re.escape, self.special))
        parts = re.split(f"({marks})", text) if marks else [text]
        ids = [token for part in parts for token in ([self.special[part]] if part in self.special else part.encode())]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def grammar(
        self, tools: str = "", reasoning: str = "", *, begun: bool = False, answer: str | None = None, parallel: bool = True
    ) -> str:
        parsers: Any = registry.load(registry.TOOL_PARSERS[tools]) if tools else None, Calls(SCHEMAS, parallel) if tools else None
        thinks = registry.load(registry.REASONING_PARSERS[reasoning]) if reasoning else None
        return grammar(self.words, answer, *parsers, thinks, opened=begun)


def check(model: Model, source: str, allowed: list[str], refused: list[str]) -> None:
    assert [text for text in allowed if not model.allows(source, text)] == []
    assert [text for text in refused if model.allows(source, text)] == []


@pytest.mark.parametrize("special", SPECIAL, ids=str)
def test_calls_that_must_be(special: tuple[str, ...]) -> None:
    model = Model(special)
    check(model, model.grammar("hermes"), [F, G, f"{F}\n{G}"], ["", "hello", WRONG, f"x{F}", f"{F}x", f"{F}\n"])
    check(model, model.grammar("hermes", parallel=False), [F, G], [f"{F}\n{G}"])
    thought = "<think>\nf <tool_x>\n</think>\n\n"
    refused = ["hello", f"<think>{F}", WRONG, f"<think>x</think>\n\n{WRONG}", "<think>x</think> hello"]
    check(model, model.grammar("hermes", "think"), [F, thought + F, f"<think></think>{G}"], refused)
    begun = model.grammar("hermes", "think", begun=True)
    check(model, begun, [f"f\n</think>\n\n{F}", f"</think>{G}"], ["hello", F, f"x</think>{WRONG}", "x</think>hello"])


@pytest.mark.parametrize("special", SPECIAL, ids=str)
def test_calls_that_may_be_in_a_text(special: tuple[str, ...]) -> None:
    model = Model(special)
    check(model, model.grammar("hermes", answer=TEXT), ["", "hello <b>\n", F, f"I look: {F}\n{G}"], [WRONG, f"I look: {WRONG}"])
    allowed = ["hello", F, f"I look: {F}", f"<think>\nx\n</think>\n\n{F}", "<think>\nx\n</think>\n\nHello", f"<think>x</think>Hello {F}"]
    if CALL[0] not in special:
        allowed.append(f"<think>use <tool_call>?</think>\n\n{F}")
    check(model, model.grammar("hermes", "think", answer=TEXT), allowed, [WRONG, f"<think>x</think>\n\n{WRONG}"])
    begun = model.grammar("hermes", "think", begun=True, answer=TEXT)
    check(model, begun, [f"x\n</think>\n\n{F}", "x\n</think>\n\nHello", f"x</think>Hello {F}"], [f"x</think>\n\n{WRONG}", "x"])


@pytest.mark.parametrize("special", SPECIAL, ids=str)
def test_an_answer_in_json_after_reasoning_or_calls(special: tuple[str, ...]) -> None:
    model, answer = Model(special), json_rule(NUMBER)
    check(model, model.grammar("", "think", begun=True, answer=answer), ['x</think>\n\n{"a": 1}'], ['{"a": 1}', 'x</think>\n\n{"b": 1}'])
    thought = '<think>x</think>\n\n{"a": 1}'
    check(model, model.grammar("", "think", answer=answer), [thought, '{"a": 1}'], ['x{"a": 1}', '<think>x</think>\n\n{"b": 1}'])
    both = model.grammar("hermes", "think", answer=answer)
    check(model, both, [thought, '{"a": 1}', F, f"<think>x</think>\n{F}"], ["hello", WRONG, '{"b": 1}'])


@pytest.mark.parametrize(
    ("name", "special", "template", "allowed", "refused"),
    [
        (
            "llama3",
            (),
            "",
            ['{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}'],
            ["x", '{"name": "h", "parameters": {}}'],
        ),
        (
            "mistral",
            MISTRAL,
            "",
            ['[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]'],
            ["[TOOL_CALLS][]"],
        ),
        ("mistral", MISTRAL, "", ['[TOOL_CALLS] [{"name": "g", "arguments": {}}]'], ["[TOOL_CALLS]f[ARGS]{}", "x"]),
        ("mistral", NEW, "", ['[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}'], ["[TOOL_CALLS][]", "[TOOL_CALLS]f[ARGS]{}"]),
        ("granite", ("<|tool_call|>",), "", ['<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]'], ["x", "<|tool_call|>[]"]),
        ("deepseek", (), "```json", [FENCED], ["x", BARE]),
        ("deepseek", DeepSeek.MARKS, "```json", [FENCED], ["x", BARE]),
        ("deepseek", DeepSeek.MARKS, "", [BARE], ["x", FENCED]),
    ],
)
def test_every_form(name: str, special: tuple[str, ...], template: str, allowed: list[str], refused: list[str]) -> None:
    model = Model(special, template)
    check(model, model.grammar(name), allowed, refused)
    tools = registry.load(registry.TOOL_PARSERS[name])
    for text in allowed:
        parser = tools()
        parts = [*parser.feed(text).calls, *parser.end().calls]
        assert {part.name for part in parts} <= {"f", "g", ""}, "what the grammar forces is what the parser reads"
    if tools.ANYWHERE:
        wrong = [text.replace('"a"', '"b"') for text in allowed if '"a"' in text]
        check(model, model.grammar(name, answer=TEXT), ["Hello", *allowed, *(f"So: {text}" for text in allowed)], wrong)


def test_harmony() -> None:
    model = Model(HARMONY)
    check(model, model.grammar("gpt-oss", "gpt-oss"), [COMMENTARY, ANALYSIS + COMMENTARY], ["x", ANALYSIS])
    answer = '<|channel|>final<|message|>{"a": 1}'
    both = model.grammar("gpt-oss", "gpt-oss", answer=json_rule(NUMBER))
    check(model, both, [COMMENTARY, answer, ANALYSIS + answer], ["x", '{"a": 1}', ANALYSIS + '{"a": 1}'])
