"""Tools, calls and their results as text, for chat templates that know none. The form is that of Hermes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

INTRODUCTION = """You may call functions to answer. Each line between <tools> and </tools> describes one:
<tools>
{tools}
</tools>
To call a function, write an object with its name and its arguments between tags. Write one such block for each call:
<tool_call>
{{"name": <function name>, "arguments": <object with the arguments>}}
</tool_call>"""


def as_text(messages: Seq[Mapping[str, Any]], tools: Seq[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The conversation with messages of the roles system, user and assistant only. Tools are described in the system message, which is
    added if there is none. Results that follow one another, and a user's message after them, become one message of the user, because
    templates may require that user and assistant take turns."""
    found: list[dict[str, Any]] = []
    answering = False  # whether the last message has results only
    for message in messages:
        result = message["role"] == "tool"
        content = f"<tool_response>\n{_joined(message['content'])}\n</tool_response>" if result else message["content"]
        if answering and (result or message["role"] == "user"):
            found[-1]["content"] += f"\n{_joined(content)}"
        elif result:
            found.append({"role": "user", "content": content})
        else:
            made = {name: value for name, value in message.items() if name != "tool_calls"}
            if calls := message.get("tool_calls"):
                made["content"] = "\n".join(filter(None, [_joined(content), *map(_call, calls)]))
            found.append(made)
        answering = result
    if tools:
        introduction = INTRODUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if found and found[0]["role"] == "system":
            found[0]["content"] = f"{_joined(found[0]['content'])}\n\n{introduction}"
        else:
            found.insert(0, {"role": "system", "content": introduction})
    return found


def _joined(content: Any) -> str:
    """The text of a content that may be in parts."""
    if not isinstance(content, list):
        return str(content)
    return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)


def _call(call: Mapping[str, Any]) -> str:
    function = call["function"]
    made = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(made, ensure_ascii=False)}\n</tool_call>"
