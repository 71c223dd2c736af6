"""Anthropic's Messages interface: a conversation in its form becomes one in OpenAI's, which the service knows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ValidationError

from redraft.serve import messages_schema, schema
from redraft.serve.chat import converse
from redraft.serve.documents import WORKING, answers
from redraft.serve.errors import Refused, renaming
from redraft.serve.messages_documents import MessageError, MessageEvent, MessageReply, MessageTokenCount
from redraft.serve.messages_reply import PATH, MessageWriter
from redraft.serve.messages_schema import Conversation, CountRequest, MessagesRequest, Turn
from redraft.serve.service import Service, service

CHOICES = {"auto": "auto", "any": "required", "none": "none"}  # ways to choose a tool, and OpenAI's names of them
NAMES = {  # of the fields of chats here
    "response_format.json_schema.schema": "output_config.format.schema", "response_format": "output_config.format",
}  # fmt: skip
BREAK = "\n\n"  # between two messages of one role, which become one

router = APIRouter()


@router.post(PATH, **answers(MessageReply, *WORKING, chunk=MessageEvent, last="or a MessageError", error=MessageError))
async def messages(http: Request, body: MessagesRequest) -> Response:
    """Replies to a conversation, in the form of Anthropic's interface."""
    here = service(http)
    most = here.config.max_stop
    if len(body.stop_sequences or ()) > most:
        raise Refused(400, f"stop_sequences has {len(body.stop_sequences or ())} strings: at most {most} are allowed", "stop_sequences")
    shows = body.thinking is None or body.thinking.display != "omitted"
    sampled = body.model_dump(include={"max_tokens", "temperature", "top_p", "top_k", "stream", "seed"}, exclude_none=True)
    more = {"stop": body.stop_sequences, "speculation": body.speculation, "cache": body.cache}
    chat = _chat(body, chat_template_kwargs=_variables(here, body), **sampled, **more)
    names = NAMES | {f"tools.{i}.function.parameters": f"tools.{i}.input_schema" for i in range(len(body.tools or ()))}
    return await renaming(converse(http, chat, partial(MessageWriter, shows=shows), "msg_"), names)


@router.post(f"{PATH}/count_tokens", **answers(MessageTokenCount, 404, 504, error=MessageError))
async def count_tokens(http: Request, body: CountRequest) -> dict[str, int]:
    """The number of tokens of a conversation, as the chat template renders it."""
    here = service(http)
    deadline = here.deadline
    here.known(body.model)
    prompt = await here.prompts.conversation(_chat(body, chat_template_kwargs=_variables(here, body)), deadline)
    return {"input_tokens": len(prompt.tokens)}


def _chat(body: Conversation, **more: Any) -> schema.ChatRequest:
    """The same conversation in OpenAI's form. Refused (400) if it has none."""
    turns = _combined(body.messages)
    continued = turns[-1][0] == "assistant"
    if continued and any(block.type == "tool_use" for block in turns[-1][1]):
        raise Refused(400, "messages: the last tool_use has no tool_result", "messages")
    given = {
        "model": body.model,
        "messages": [*_system(body), *(message for role, blocks in turns for message in _messages(role, blocks))],
        "continue_final_message": continued or None,
        "response_format": _format(body),
        **_tools(body),
    }
    _check_calls(body.messages)
    try:
        return schema.ChatRequest(**{name: value for name, value in (given | more).items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        text = str(first["msg"]).removeprefix("Value error, ")
        place = ".".join(map(str, first["loc"]))
        raise Refused(400, f"{place}: {text[:1].lower()}{text[1:]}" if place else text, place or text.partition(":")[0]) from None


def _combined(turns: list[Turn]) -> list[tuple[str, list[Any]]]:
    """(role, blocks) of the turns. Consecutive messages of the user or of the assistant are one turn."""
    found: list[tuple[str, list[Any]]] = []
    for turn in turns:
        if found and found[-1][0] == turn.role != "system":
            blocks = found[-1][1]
            between = blocks and turn.blocks and blocks[-1].type == turn.blocks[0].type == "text"
            blocks += [*([messages_schema.Text(type="text", text=BREAK)] if between else []), *turn.blocks]
        else:
            found.append((turn.role, turn.blocks))
    return found


def _system(body: Conversation) -> list[schema.Message]:
    if body.system is None:
        return []
    return [schema.Message(role="system", content=_text(body.system))]


def _messages(role: str, blocks: list[Any]) -> Iterator[schema.Message]:
    """A turn as messages of OpenAI's form, where each result of a tool is one of its own."""
    if role == "assistant":
        calls = [block for block in blocks if block.type == "tool_use"]
        yield schema.Message(
            role="assistant",
            content=_text([block for block in blocks if block.type == "text"]),
            reasoning_content="".join(block.thinking for block in blocks if block.type == "thinking") or None,
            tool_calls=[_call(block) for block in calls] or None,
        )
        return
    texts: list[Any] = []
    for block in blocks:
        if block.type == "tool_result":
            yield schema.Message(role="tool", tool_call_id=block.tool_use_id, content=_text(block.content or ""))
        else:
            texts.append(block)
    if texts or not blocks:
        yield schema.Message(role="system" if role == "system" else "user", content=_text(texts))


def _call(block: messages_schema.ToolUse) -> schema.ToolCall:
    return schema.ToolCall(id=block.id, type="function", function=schema.FunctionCall(name=block.name, arguments=block.input))


def _text(content: str | list[Any]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _check_calls(turns: list[Turn]) -> None:
    """Refused (400) if a result belongs to no earlier call."""
    called: set[str] = set()
    for i, turn in enumerate(turns):
        for j, block in enumerate(turn.blocks):
            if block.type == "tool_use":
                called.add(block.id)
            elif block.type == "tool_result" and block.tool_use_id not in called:
                place = f"messages.{i}.content.{j}.tool_use_id"
                raise Refused(400, f"{place} = {block.tool_use_id!r}: no tool_use before it has this id", place)


def _tools(body: Conversation) -> dict[str, Any]:
    """The fields for tools."""
    choice, given = body.tool_choice, body.tools or []
    tools = [
        schema.Tool(
            type="function",
            function=schema.Function(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict),
        )
        for tool in given
    ]
    found: dict[str, Any] = {"tools": tools or None}
    if choice is None:
        return found
    if body.output_config is not None and body.output_config.format is not None and choice.type in ("any", "tool"):
        raise Refused(400, f"tool_choice: type {choice.type} and output_config.format exclude each other", "tool_choice")
    if choice.name is not None and choice.name not in [tool.name for tool in given]:
        raise Refused(400, f"tool_choice.name = {choice.name!r}: no tool has this name", "tool_choice.name")
    found["tool_choice"] = CHOICES.get(choice.type) or schema.ToolChoice(type="function", function=schema.Named(name=choice.name or ""))
    found["parallel_tool_calls"] = False if choice.disable_parallel_tool_use else None
    return found


def _format(body: Conversation) -> schema.ResponseFormat | None:
    if body.output_config is None or (wanted := body.output_config.format) is None:
        return None
    return schema.ResponseFormat(type="json_schema", json_schema=schema.JsonSchema(name="reply", schema=wanted.schema_, strict=True))


def _variables(here: Service, body: Conversation) -> dict[str, Any]:
    """What tells chat templates whether the model reasons, and how much."""
    found: dict[str, Any] = {}
    if body.thinking is not None:
        wanted = body.thinking.type != "disabled"
        found |= {"enable_thinking": wanted, "thinking": wanted}
    if body.output_config is not None and body.output_config.effort is not None:
        found |= here.effort(body.output_config.effort, "output_config.effort", body.tools)
    return found
