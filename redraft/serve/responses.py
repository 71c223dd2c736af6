"""The endpoints of OpenAI's Responses API."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from redraft.errors import RedraftError
from redraft.serve import responses_documents as documents
from redraft.serve.chat import converse
from redraft.serve.documents import WORKING, answers
from redraft.serve.errors import Refused, refused
from redraft.serve.invalid import made
from redraft.serve.responses_items import given, messages
from redraft.serve.responses_reply import ResponseWriter
from redraft.serve.responses_schema import ResponseRequest
from redraft.serve.schema import ChatRequest, Generated
from redraft.serve.service import Service, service
from redraft.serve.stored import Stored, Turn

NAMES = (  # the begin of the name of a chat's field or of an engine's option, and its name here
    (re.compile(r"messages([.[]\d+]?)?"), "input"),
    (re.compile(r"max_(completion_)?tokens\b"), "max_output_tokens"),
    (re.compile(r"response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"(tools\.\d+|tool_choice)\.function\b"), r"\1"),
)
LAST = "; the last is response.completed, response.incomplete or response.failed"

router = APIRouter()


@router.post("/v1/responses", **answers(documents.Response, *WORKING, chunk=documents.ResponseEvent, last=LAST))
async def create(http: Request, body: ResponseRequest) -> Response:
    """Replies to a conversation, and keeps the reply."""
    here, stored, key = service(http), _stored(http), http.scope["redraft.key"]
    if body.store and not stored.count:
        raise Refused(400, "store = true: this server stores no responses (stored_responses = 0)", "store")
    keeps = body.store is not False and stored.count > 0

    def keep(response: dict[str, Any]) -> None:
        stored.add(key, Turn(response, given(body.items, response["id"].partition("_")[2]), body.previous_response_id))

    try:
        chat = _chat(here, body, stored.conversation(key, body.previous_response_id))
        return await converse(http, chat, partial(ResponseWriter, body, keep if keeps else None), "resp_")
    except (Refused, RedraftError) as error:
        raise _renamed(refused(error)) from None


@router.get("/v1/responses/{response_id}", **answers(documents.Response, 404))
async def retrieve(http: Request, response_id: str) -> dict[str, Any]:
    """A stored response, as it was sent."""
    _check_query(http)
    return _stored(http).get(http.scope["redraft.key"], response_id).response


@router.delete("/v1/responses/{response_id}", **answers(documents.Deleted, 404))
async def delete(http: Request, response_id: str) -> dict[str, Any]:
    """Forgets a stored response. No response can continue it or what follows it."""
    _stored(http).drop(http.scope["redraft.key"], response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/v1/responses/{response_id}/cancel", **answers(documents.Response, 404, text="never: none runs in the background"))
async def cancel(http: Request, response_id: str) -> None:
    """Refused: a client cancels a response by disconnecting."""
    _stored(http).get(http.scope["redraft.key"], response_id)
    raise Refused(400, "cancel: this server does not support responses in the background; disconnect to cancel a response", "response_id")


@router.get("/v1/responses/{response_id}/input_items", **answers(documents.InputItems, 404))
async def input_items(
    http: Request,
    response_id: str,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(max_length=1000)] = None,
) -> dict[str, Any]:
    """The items that a stored response answers, without those of earlier responses."""
    _check_query(http, "limit", "order", "after")
    items = _stored(http).get(http.scope["redraft.key"], response_id).items
    if order == "desc":
        items.reverse()
    if after is not None:
        place = next((place for place, item in enumerate(items, 1) if item["id"] == after), None)
        if place is None:
            raise Refused(400, f"after = {after!r}: the response has no such item", "after")
        items = items[place:]
    page = items[:limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": "", "last_id": ""}
    return {"object": "list", "data": page, **ends, "has_more": len(items) > limit}


def _stored(http: Request) -> Stored:
    return cast(Stored, http.app.state.stored)


def _chat(here: Service, body: ResponseRequest, history: list[dict[str, Any]]) -> ChatRequest:
    """The same request as a chat."""
    if body.top_logprobs and not body.logprobs:
        raise Refused(400, "top_logprobs needs include = ['message.output_text.logprobs']", "top_logprobs")
    said = messages([*history, *given(body.items, "")])
    if body.instructions is not None:
        said.insert(0, {"role": "system", "content": body.instructions})
    common = {name: getattr(body, name) for name in Generated.model_fields}
    own = {
        "messages": said,
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": body.logprobs,
        "top_logprobs": body.top_logprobs,
        "response_format": _response_format(body),
        "tools": [_tool(tool) for tool in body.tools or []] or None,
        "tool_choice": _tool_choice(body),
        "parallel_tool_calls": body.parallel_tool_calls,
        "chat_template_kwargs": _variables(here, body),
    }
    return made(ChatRequest, common | own)


def _response_format(body: ResponseRequest) -> dict[str, Any] | None:
    format = None if body.text is None else body.text.format
    if format is None or format.type != "json_schema":
        return None if format is None else {"type": format.type}
    return {"type": "json_schema", "json_schema": {"name": format.name, "schema": format.schema_, "strict": format.strict}}


def _tool(tool: Any) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _tool_choice(body: ResponseRequest) -> Any:
    choice = body.tool_choice
    return choice if choice is None or isinstance(choice, str) else {"type": "function", "function": {"name": choice.name}}


def _variables(here: Service, body: ResponseRequest) -> dict[str, Any] | None:
    """Variables for the chat template: what the request gives, and the effort of reasoning if the template knows it."""
    effort = None if body.reasoning is None else body.reasoning.effort
    if effort is None:
        return body.chat_template_kwargs
    return {**(body.chat_template_kwargs or {}), **here.effort(effort, "reasoning.effort", body.tools)}


def _check_query(http: Request, *known: str) -> None:
    """Refuses unknown parameters of the query by name."""
    for name in http.query_params:
        if name not in known:
            raise Refused(400, f"unknown parameter {name!r} of the query", name)


def _renamed(error: Refused) -> Refused:
    """The error of a chat with the field's name in this interface."""
    if error.param is None:
        return error
    message, param = error.message, error.param
    for old, new in NAMES:
        if old.match(param):
            message = old.sub(new, message, 1) if old.match(message) else message
            param = old.sub(new, param, 1)
    return replace(error, message=message, param=param)
