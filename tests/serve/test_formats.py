"""The parsers that a server chooses by its template, and what a request makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from redraft.config import Grammar
from redraft.models.tokenizer import Tokenizer
from redraft.serve import schema
from redraft.serve.errors import Refused
from redraft.serve.formats import Formats
from redraft.serve.parsers.parser import Plain
from tests.serve.raw import embedded

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
LIST = {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
SCHEMA = Grammar("json", '{"type": "object"}')


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return embedded().tokenizer


def body(**given: Any) -> schema.ChatRequest:
    return schema.ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], **given})


@pytest.mark.parametrize(
    ("template", "tools", "reasoning", "as_text"),
    [
        ("{{ tools }}<tool_call>{\"name\": ..., \"arguments\": ...}</think>", "Hermes", "Think", False),
        ("{{ tools }}<|python_tag|>", "Llama3", None, False),
        ('{{ tools }}{"name": function name, "parameters": dictionary of argument name and its value}', "Llama3", None, False),
        ("{{ tools }}[TOOL_CALLS][THINK][/THINK]", "Mistral", "Magistral", False),
        ("{{ tools }}<|tool_call|>", "Granite", None, False),
        ("{{ tools }}<｜tool▁calls▁begin｜></think>", "DeepSeek", "Think", False),
        ("{{ tools }}<|channel|>analysis functions.", "HarmonyCalls", "Harmony", False),
        ("{{ tools }}<tool_call><function=f>arguments", "Hermes", None, True),
        ("{{ tools }}<tool_call>arguments<arg_key>", "Hermes", None, True),
        ("{{ messages }}<tool_call>arguments", "Hermes", None, False),
        ("{{ messages }}{# tools <|python_tag|> #}", "Hermes", None, False),
    ],
)  # fmt: skip
def test_the_template_chooses(tokenizer: Tokenizer, template: str, tools: str, reasoning: str | None, as_text: bool) -> None:
    found = Formats(tokenizer, template, None, None)
    assert found.tools is not None and found.tools.__name__ == tools
    assert (found.reasoning and found.reasoning.__name__) == reasoning
    assert found.tools_as_text is as_text
    off = Formats(tokenizer, template, "none", "none")
    assert (off.tools, off.reasoning, off.tools_as_text) == (None, None, False)


def test_no_grammar_where_nothing_is_to_be_forced(tokenizer: Tokenizer) -> None:
    formats = Formats(tokenizer, "{{ messages }}", None, None)
    assert formats.reading(body(), "", None).parser is Plain
    assert formats.reading(body(tools=[TOOL], tool_choice="none"), "", SCHEMA).structure == SCHEMA
    assert formats.reading(body(tools=[TOOL]), "", None).structure is not None
    special = next(iter(formats.words.special))
    more: dict[str, Any]
    for more in ({"min_tokens": 2}, {"ignore_eos": True}, {"stop_token_ids": [3]}, {"stop": special}, {"stop": ["a", f"{special}\n"]}):
        assert formats.reading(body(tools=[TOOL], **more), "", None).structure is None
    assert formats.reading(body(tools=[TOOL], stop=["a"]), "", None).structure is not None
    own = Grammar("grammar", 'start: "x"')
    assert formats.reading(body(tools=[TOOL]), "", own).structure == own
    llama = Formats(tokenizer, "{{ messages }}", "llama3", None)
    assert llama.reading(body(tools=[TOOL]), "", None).structure is None
    with pytest.raises(Refused, match="begin alike"):
        llama.reading(body(tools=[TOOL]), "", SCHEMA)


def test_reasoning_that_the_prompt_has_ended(tokenizer: Tokenizer) -> None:
    formats = Formats(tokenizer, "{{ messages }}", None, "think")
    assert formats.reading(body(), "<think></think>", None).parser is Plain
    assert formats.reading(body(), "<think></think>", SCHEMA).structure == SCHEMA
    assert formats.reading(body(), "<think>", SCHEMA).structure != SCHEMA
    said = formats.reading(body(), "<think>", None).parser().feed("so</think>yes")
    assert (said.reasoning, said.content) == ("so", "yes")


def test_special_tokens_that_are_marks_stay_in_the_text(tokenizer: Tokenizer) -> None:
    spelling = next(iter(tokenizer.left_out.values()))
    formats = Formats(tokenizer, "{{ messages }}", None, "think")
    assert formats.reading(body(tools=[TOOL]), "", None).hidden is None, "its marks are plain text"

    class Marked(formats.tools):  # type: ignore[name-defined,misc]
        MARKS = (spelling,)

    formats.tools = Marked
    hidden = formats.reading(body(tools=[TOOL]), "", None).hidden
    assert hidden is not None and set(hidden.values()) == set(tokenizer.left_out.values()) - {spelling}
    assert formats.reading(body(tools=[TOOL], skip_special_tokens=False), "", None).hidden == {}


@pytest.mark.parametrize(
    ("given", "structure", "param"),
    [
        ({"tool_choice": "required"}, SCHEMA, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, SCHEMA, "tool_choice"),
        ({"tool_choice": "required", "tools": [LIST]}, None, "tools.0.function.parameters"),
    ],
)
def test_what_cannot_be_forced(tokenizer: Tokenizer, given: dict[str, Any], structure: Grammar | None, param: str) -> None:
    with pytest.raises(Refused) as error:
        Formats(tokenizer, "{{ messages }}", None, None).reading(body(**{"tools": [TOOL], **given}), "", structure)
    assert (error.value.status, error.value.param) == (400, param)
    with pytest.raises(Refused, match="reads no tool calls"):
        Formats(tokenizer, "{{ messages }}", "none", None).reading(body(tools=[TOOL], tool_choice="required"), "", None)
