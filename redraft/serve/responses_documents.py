"""The forms of the Responses API's answers and events in the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from redraft.serve.documents import ContentLogprob, Form, Origin, RequestMetrics, Tree
from redraft.serve.responses_schema import Status


class OutputText(Form):
    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[ContentLogprob]


class InputText(Form):
    type: Literal["input_text"]
    text: str


class ReasoningText(Form):
    type: Literal["reasoning_text"]
    text: str


class OutputMessage(Form):
    type: Literal["message"]
    id: str
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class InputMessage(Form):
    type: Literal["message"]
    id: str
    status: Status
    role: Literal["system", "developer", "user"]
    content: list[InputText]


class Call(Form):
    type: Literal["function_call"]
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


class Result(Form):
    type: Literal["function_call_output"]
    id: str
    status: Status
    call_id: str
    output: str


class Thought(Form):
    type: Literal["reasoning"]
    id: str
    status: Status
    summary: list[None]
    content: list[ReasoningText]


class CachedInput(Form):
    cached_tokens: int
    cache_write_tokens: Literal[0]


class OutputTokens(Form):
    reasoning_tokens: int
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class ResponseUsage(Form):
    input_tokens: int
    input_tokens_details: CachedInput
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class Failure(Form):
    code: Literal["server_error"]
    message: str


class Incomplete(Form):
    reason: Literal["max_output_tokens"]


class Response(Form):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: Failure | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | Call | Thought]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, str]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    metrics: RequestMetrics | None = None
    token_ids: list[int] | None = None
    provenance: list[Origin] | None = None
    trees: list[Tree] | None = None


class Deleted(Form):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItems(Form):
    object: Literal["list"]
    data: list[InputMessage | OutputMessage | Call | Result | Thought]
    first_id: str
    last_id: str
    has_more: bool


# ---- events


class Event(Form):
    sequence_number: int


class ResponseState(Event):
    type: Literal["response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"]
    response: Response


class ItemState(Event):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputMessage | Call | Thought


class ItemEvent(Event):
    output_index: int
    item_id: str


class PartState(ItemEvent):
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: Literal[0]
    part: OutputText | ReasoningText


class TextDelta(ItemEvent):
    type: Literal["response.output_text.delta"]
    content_index: Literal[0]
    delta: str
    logprobs: list[ContentLogprob]


class TextDone(ItemEvent):
    type: Literal["response.output_text.done"]
    content_index: Literal[0]
    text: str
    logprobs: list[ContentLogprob]


class ReasoningDelta(ItemEvent):
    type: Literal["response.reasoning_text.delta"]
    content_index: Literal[0]
    delta: str


class ReasoningDone(ItemEvent):
    type: Literal["response.reasoning_text.done"]
    content_index: Literal[0]
    text: str


class ArgumentsDelta(ItemEvent):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(ItemEvent):
    type: Literal["response.function_call_arguments.done"]
    arguments: str


Kind = ResponseState | ItemState | PartState | TextDelta | TextDone | ReasoningDelta | ReasoningDone | ArgumentsDelta | ArgumentsDone


class ResponseEvent(RootModel[Annotated[Kind, Field(discriminator="type")]]):
    """The data of an event of a stream."""
