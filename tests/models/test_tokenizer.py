"""Bytes of tokens, chat templates and the token that begins a text, with tiny tokenizers and the embedded one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import processors

from redraft.errors import InvalidInput
from redraft.models import loader
from redraft.models.tokenizer import Tokenizer
from tests.checkpoints import tiny_llama
from tests.models.kinds import TEXTS, byte_level, save, sentencepiece


def joined(tokenizer: Tokenizer, text: str) -> bytes:
    return b"".join(tokenizer.bytes_of(token) for token in tokenizer.encode(text, special=False))


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_a_byte_level_text(tmp_path: Path, text: str) -> None:
    tokenizer = byte_level(tmp_path)
    assert joined(tokenizer, text) == text.encode()
    assert joined(tokenizer, "<tool>naïve</s>" + text) == ("<tool>naïve</s>" + text).encode()


@pytest.mark.parametrize("text", [text for text in TEXTS if "▁" not in text])  # the letter that stands for a space
def test_bytes_of_a_sentencepiece_text(tmp_path: Path, text: str) -> None:
    tokenizer = sentencepiece(tmp_path)
    assert joined(tokenizer, text) == b" " + text.encode(), "with the leading space"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.bytes_of(3 + 0x0A) == b"\n" and tokenizer.bytes_of(2) == b"</s>"


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path, make: Callable[[Path], Tokenizer]) -> None:
    with pytest.raises(InvalidInput, match="half of a surrogate pair"):
        make(tmp_path).encode("a\ud800")


def test_a_word_of_white_space_has_one_spelling() -> None:
    """Without its white space nothing is left to follow a space, and the space itself must not be banned."""
    tokenizer = Tokenizer(loader.resolve("embedded"))
    assert tokenizer.spellings("\n\n") == [tokenizer.encode("\n\n", special=False)]
    assert len(tokenizer.spellings("return")) == 2


def test_bytes_of_the_embedded_model() -> None:
    tokenizer = Tokenizer(loader.resolve("embedded"))
    for text in TEXTS:
        ids = tokenizer.encode(text, special=False)
        decoded = tokenizer.decode_all(ids)
        assert joined(tokenizer, text).decode() in (decoded, " " + decoded), "a decoder may strip the leading space"


def test_an_id_that_the_tokenizer_lacks_is_nothing(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    assert tokenizer.bytes_of(len(tokenizer) + 7) == b""


def test_a_text_begins_once(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    first = tokenizer.vocabulary.id("bos_token")
    assert tokenizer.encode("a")[0] == first != tokenizer.encode("a")[1]
    assert tokenizer.encode("<s>a") == tokenizer.encode("a")
    assert tokenizer.encode("<s><s>a") == [first, *tokenizer.encode("a")], "what the user wrote twice stays"
    assert tokenizer.encode("<s><s>a", special=False) == [first, first, *tokenizer.encode("a", special=False)]
    assert tokenizer.encode("") == [first]


def test_where_nothing_is_put_before_a_text_nothing_is_taken_away(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    made = Fast.from_file(str(tmp_path / "tokenizer.json"))
    made.post_processor = processors.ByteLevel()
    tokenizer = save(tmp_path, made)
    first = tokenizer.vocabulary.id("bos_token")
    assert tokenizer.encode("<s><s>a")[:2] == [first, first] and tokenizer.encode("a")[0] != first


def test_a_template_that_writes_the_first_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny_llama(tmp_path))
    template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}{% if shout %}!{% endif %}"
    said = [{"role": "user", "content": "hi"}]
    ids = tokenizer.encode_chat(said, template=template)
    assert ids == tokenizer.encode("hi") == tokenizer.encode(tokenizer.render(said, template=template))
    assert tokenizer.render(said, template=template, shout=True) == "<s>hi!"
    assert tokenizer.render(said, add_generation_prompt=False) == "[user] hi\n"


def test_what_a_template_refuses(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny_llama(tmp_path, chat=False))
    with pytest.raises(InvalidInput, match="no chat template"):
        tokenizer.render([{"role": "user", "content": "hi"}])
    with pytest.raises(InvalidInput, match="role and content are needed"):
        tokenizer.render([{"role": "user"}], template="x")
    with pytest.raises(InvalidInput, match="refuses them"):
        tokenizer.render([{"role": "user", "content": "hi"}], template="{{ raise_exception('no') }}")
    with pytest.raises(InvalidInput, match="refuses them"):
        tokenizer.render([{"role": "user", "content": "hi"}], template="{% for %}")


TOOLS = """{# developer #}{% for m in messages %}{% if m.role == 'tool' %}<result>{{ m.content }}</result>{% else %}
{%- set said = m.content %}[{{ m.role }}]{{ said }}
{%- for call in m.tool_calls %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}
{%- if 'tool_calls' in m %}!{% endif %}{% if 'refusal' in m or 'annotations' in m %}?{% endif %}{% endif %}{% endfor %}"""
CALL = {"id": "call_1", "type": "function", "function": {"name": "thermometer", "arguments": '{"unit": "C"}'}}


@pytest.fixture
def chat(tmp_path: Path) -> Tokenizer:
    return Tokenizer(tiny_llama(tmp_path))


def test_tool_calls_and_results_reach_a_template_that_knows_them(chat: Tokenizer) -> None:
    said = [
        {"role": "user", "content": "warm?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "21"},
    ]
    expected = '[user]warm?[assistant]<call>thermometer {"unit": "C"}</call>!<result>21</result>'
    assert chat.render(said, template=TOOLS) == expected
    said[1] = {"role": "assistant", "tool_calls": [{"function": {"name": "thermometer", "arguments": {"unit": "C"}}}]}
    assert chat.render(said, template=TOOLS) == expected
    said[1]["tool_calls"] = [{"function": {"name": "thermometer", "arguments": ""}}]
    assert "<call>thermometer {}</call>" in chat.render(said, template=TOOLS)


def test_arguments_are_text_for_a_template_that_adds_them_to_text(chat: Tokenizer) -> None:
    template = "{% for m in messages %}{% for c in m.tool_calls %}{{ '<' + c.function.arguments + '>' }}{% endfor %}{% endfor %}"
    said = [{"role": "assistant", "tool_calls": [CALL, CALL]}]
    assert chat.render(said, template=template) == '<{"unit": "C"}><{"unit": "C"}>'
    with pytest.raises(InvalidInput, match="refuses them: can only concatenate str"):
        chat.render(said, template="{% for m in messages %}{{ '<' + m.tool_calls }}{% endfor %}")


ASKED = '<tool_call>\n{"name": "thermometer", "arguments": {"unit": "C"}}\n</tool_call>'


def answered(text: str) -> str:
    return f"<tool_response>\n{text}\n</tool_response>"


def test_calls_and_results_become_text_where_the_template_knows_none(chat: Tokenizer) -> None:
    said: list[dict[str, Any]] = [
        {"role": "user", "content": "warm?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "21"},
        {"role": "tool", "content": [{"type": "text", "text": "22"}]},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "23"},
    ]
    template = (
        "{# 'tool' tool_calls tools #}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}!{% endif %}{% endfor %}"
    )
    expected = f"[user]warm?[assistant]I look.\n{ASKED}\n{ASKED}[user]{answered('21')}\n{answered('22')}\nAnd now?"
    expected += f"[assistant]{ASKED}[user]{answered('23')}"
    before = repr(said)
    assert chat.render(said, template=template) == expected
    assert repr(said) == before, "the caller's messages are not changed"


def test_tools_are_described_in_the_system_message_where_the_template_knows_none(chat: Tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("f", "g")]
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ tools }}"
    given = {"template": template.replace("{{ tools }}", ""), "tools": tools}
    got = chat.render([{"role": "user", "content": "hi"}], **given)
    lines = "\n".join(map(json.dumps, tools))
    assert got.startswith("[system]") and got.endswith("[user]hi") and f"<tools>\n{lines}\n</tools>" in got
    system = chat.render([{"role": "developer", "content": "Be terse."}, {"role": "user", "content": "hi"}], **given)
    assert system.startswith("[system]Be terse.\n\n") and system.removeprefix("[system]Be terse.\n\n") == got.removeprefix("[system]")
    assert chat.render([{"role": "user", "content": "hi"}], template=template, tools=tools) == f"[user]hi{tools}"
    assert chat.render([{"role": "user", "content": "hi"}], template=template, tools=tools, tools_as_text=True) == f"{got}None"


def test_neutral_fields_of_a_message_count_as_not_given(chat: Tokenizer) -> None:
    said = [{"role": "assistant", "content": "hi", "tool_calls": [], "annotations": [], "refusal": None, "name": ""}]
    assert chat.render(said, template=TOOLS) == "[assistant]hi"
    assert chat.encode_chat(said) == chat.encode_chat([{"role": "assistant", "content": "hi"}])
    assert said[0]["tool_calls"] == [], "the caller's message is not changed"


def test_the_developer_role(chat: Tokenizer) -> None:
    said = [{"role": "developer", "content": "Be terse."}]
    assert chat.render(said) == "[system] Be terse.\n[assistant]"
    assert chat.render(said, template=TOOLS) == "[system]Be terse."
    knows = "{% for m in messages %}{% if m['role'] == \"developer\" %}<{{ m['role'] }}>{% endif %}{% endfor %}"
    assert chat.render(said, template=knows) == "<developer>"


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("hi", r"messages\[0\] is a str"),
        ({"role": "user", "content": None}, r"messages\[0\].content = None"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, r"messages\[0\].tool_calls\[0\] = .*function.name"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, r"arguments = '\{': a JSON object"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, r"arguments = \[1\]: a JSON object"),
        ({"role": "assistant", "tool_calls": "f"}, r"tool_calls\[0\] = 'f'"),
    ],
)
def test_messages_that_are_malformed(chat: Tokenizer, message: Any, named: str) -> None:
    with pytest.raises(InvalidInput, match=named) as caught:
        chat.render([message], template=TOOLS)
    assert "\n" not in str(caught.value)


def test_a_start_does_not_load_the_compiler() -> None:
    """The configuration classes of transformers load it, for seconds. A process of its own, because other tests load it."""
    code = "import sys; from redraft import LLM; LLM('embedded').generate('a'); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
