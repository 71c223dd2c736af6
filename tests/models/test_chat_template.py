"""Conversations are rendered as transformers renders them."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from redraft.models import chat_template
from tests.models import kinds

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0, seen=[]) %}
{%- for message in messages %}
    {%- if message.role == 'skipped' %}{% continue %}{% endif %}
    {%- set ns.last = loop.index0 %}
    {%- if message.content is string %}{% set content = message.content %}{% else %}{% set content = message.content[-1].text %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
    {%- generation %}{{- content | trim if trims else content }}{% endgeneration %}
    {{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LOOSE = """  {% if documents %}
    {{ documents | tojson(indent=1) }}
  {% endif %}
{{ bos_token }}{% for m in messages %}
  [{{ m['role'] }}] {{ m['content'] }}{{ m.thinking or '' }}
{% endfor %}
{% if strict and messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ dict(a=1) | tojson }}"""
SAID = [{"role": "user", "content": " hi <b>&\n"}, {"role": "skipped", "content": "x"}, {"role": "assistant", "content": "yo  "}]
TOOL = {"type": "function", "function": {"name": "clock", "description": "Zeit ö", "parameters": {"type": "object", "properties": {}}}}


def theirs(folder: Path) -> Any:
    kinds.byte_level(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": True},
    {"tools": [TOOL, TOOL]},
    {"documents": [{"title": "a", "text": "b"}]},
    {"trims": True},
    {"continue_final_message": True},
    {"continue_final_message": True, "trims": True},
]


@pytest.mark.parametrize("template", [CHATML, LOOSE])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_texts_are_equal(template: str, options: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = theirs(tmp_path)
    conversations: list[list[dict[str, Any]]] = [
        SAID,
        SAID[:1],
        [{"role": "assistant", "content": "a", "reasoning": "why"}, {"role": "user", "content": "b", "thinking": "t"}],
    ]
    if template == CHATML:
        conversations.append([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a part "}]}])
    for said in conversations:
        found = chat_template.render(template, said, **{**tokenizer.special_tokens_map, **options})
        assert found == tokenizer.apply_chat_template(said, chat_template=template, tokenize=False, **options)


def test_the_caller_keeps_its_messages() -> None:
    said: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    chat_template.render("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", said, continue_final_message=True)
    assert said == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


class Kind(str, Enum):  # noqa: UP042  # its str() is not its value
    ONE = "one"


def test_a_template_sees_plain_data_only() -> None:
    class Object:
        danger = "reached"

    template = "{{ x }} {{ y }} {{ z.danger }} {{ t }}"
    found = chat_template.render(template, [{"role": "user"}], x=Object(), y=Kind.ONE, z=Object(), t=(True, 1.5))
    assert found == "<Object> one  [True, 1.5]"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.__globals__.json }}",
        "{% set n = namespace(__init__=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ raise_exception('own words') }}",
        "{% for %}",
    ],
)
def test_what_a_template_may_not_do(template: str) -> None:
    with pytest.raises(jinja2.TemplateError):
        chat_template.render(template, [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("said", "template", "options", "why"),
    [
        ([], "x", {}, "at least one message"),
        (SAID, "x", {"continue_final_message": True}, "does not show the end"),
        (SAID, CHATML, {"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
        ([{"role": "user", "content": []}], CHATML, {"continue_final_message": True}, "no text to continue"),
        ([{"role": "user", "content": None}], CHATML, {"continue_final_message": True}, "no text to continue"),
    ],
)
def test_what_cannot_be_rendered(said: Any, template: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        chat_template.render(template, said, **options)
