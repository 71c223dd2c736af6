"""Renders conversations by a checkpoint's chat template, as transformers does, in jinja's sandbox.

A template comes with a checkpoint, so it sees plain data only: strings, numbers, lists and dictionaries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from datetime import datetime
from functools import lru_cache
from typing import Any

CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "  # stands where the last message ends
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning; templates read the first two


def render(
    template: str,
    messages: Seq[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    tools: Seq[Mapping[str, Any]] | None = None,
    documents: Seq[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation. continue_final_message: the text ends where the content of the last message ends. Raises ValueError if
    that is not possible, and jinja2.TemplateError or what the template raises."""
    said = [_with_reasoning(_plain(message)) for message in messages]
    if not said:
        raise ValueError("at least one message is needed")
    last = ""
    if continue_final_message:
        if add_generation_prompt:
            raise ValueError("add_generation_prompt and continue_final_message exclude each other")
        last = _mark(said[-1])
    made = _compiled(template)
    text: str = made.render(
        messages=said, tools=_plain(tools), documents=_plain(documents), add_generation_prompt=add_generation_prompt, **_plain(variables)
    )
    return _up_to_mark(text, last) if continue_final_message else text


def _mark(message: dict[str, Any]) -> str:
    """Marks the end of a message's text, which is returned."""
    content = message.get("content")
    texts = [part for part in content if isinstance(part, dict) and "text" in part] if isinstance(content, list) else []
    if isinstance(content, str):
        message["content"] = content + CONTINUED
        return content
    if texts:
        found: str = texts[-1]["text"]
        texts[-1]["text"] = found + CONTINUED
        return found
    raise ValueError("the last message has no text to continue")


def _up_to_mark(text: str, last: str) -> str:
    mark = CONTINUED.strip()
    at = text.rfind(mark)
    if at < 0 or last.strip() not in text:
        raise ValueError("the chat template does not show the end of the last message, so it cannot be continued")
    return text[:at] if text[at:].startswith(CONTINUED) else text[:at].rstrip()  # a template may strip the message


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _plain(value: Any) -> Any:
    """Copies of plain data; anything else becomes the name of its type."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return str.__str__(value) if kind is str else kind(value)
    return f"<{type(value).__name__}>"


@lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """{% generation %}: marks what a model wrote, for training; the text is the same."""

        tags = {"generation"}  # noqa: RUF012  # as jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    class Namespace(jinja2.utils.Namespace):
        """Takes no names that begin with an underscore, which could reach Python's own."""

        def __init__(*given: Any, **more: Any) -> None:  # no `self`, which a template may give
            first, *rest = given
            attributes = dict(*rest, **more)
            for name in attributes:
                _check(name)
            jinja2.utils.Namespace.__init__(first, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check(name)
            super().__setitem__(name, value)

    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace: {name!r} begins with an underscore")

    def plain_dict(*given: Any, **more: Any) -> dict[Any, Any]:  # without the attributes of the type
        return dict(*given, **more)

    made = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now, "dict": plain_dict, "namespace": Namespace}
    return made.from_string(template)
