"""The bodies of OpenAI's Responses API."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from redraft.serve.schema import CONTENT_PARTS, MAX_NUMBER, MESSAGES, VARIABLES, Body, Generated, LongText, Short

TOOLS = 128  # of a request
LACKING = {
    "access_programs": "access programs", "background_options": "responses in the background",
    "context_management": "compaction", "conversation": "conversations, but previous_response_id", "image": "images",
    "max_tool_calls": "tools of its own", "moderation": "moderation", "prompt": "stored prompts",
    "prompt_cache_options": "options of the prefix cache, but cache_salt", "n": "several texts in one response",
    "response_format": "response_format here, but text.format", "max_tokens": "max_tokens here, but max_output_tokens",
    "max_completion_tokens": "max_completion_tokens here, but max_output_tokens", "messages": "messages here, but input",
    "generate": "requests that generate nothing", "reasoning_effort": "reasoning_effort here, but reasoning.effort",
}  # fmt: skip
ITEMS = "message, function_call, function_call_output and reasoning"

Status = Literal["in_progress", "completed", "incomplete"]
Name = Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=1000)]


# ---- items


def _object(text: str) -> str:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("a JSON object is needed")
    return text


class Item(Body):
    id: str | None = Field(None, max_length=1000)
    status: Status | None = Field(None, description="accepted, and without effect")


class TextPart(Body):
    type: Literal["input_text", "output_text"] = Field(description="only text is supported")
    text: LongText
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = Field(None, description="accepted, and without effect")


class MessageItem(Item):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: LongText | Annotated[list[TextPart], Field(max_length=CONTENT_PARTS)]
    phase: Literal["commentary", "final_answer"] | None = Field(None, description="accepted, and without effect")

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class CallItem(Item):
    """A function that the assistant called in an earlier turn."""

    type: Literal["function_call"]
    call_id: CallId
    name: Annotated[str, Field(min_length=1, max_length=1000)]
    arguments: Annotated[LongText, AfterValidator(_object)] = Field(description="the text of a JSON object")


class OutputPart(Body):
    type: Literal["input_text"] = Field(description="only text is supported")
    text: LongText


class ResultItem(Item):
    type: Literal["function_call_output"]
    call_id: CallId = Field(description="of the call whose result this is")
    output: LongText | Annotated[list[OutputPart], Field(max_length=CONTENT_PARTS)]

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


class SummaryPart(Body):
    type: Literal["summary_text"]
    text: LongText


class ReasoningPart(Body):
    type: Literal["reasoning_text"]
    text: LongText


class ReasoningItem(Item):
    """What the assistant thought in an earlier turn. The template decides whether the model reads it again."""

    type: Literal["reasoning"]
    summary: Annotated[list[SummaryPart], Field(max_length=CONTENT_PARTS)] | None = None
    content: Annotated[list[ReasoningPart], Field(max_length=CONTENT_PARTS)] | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or self.summary or [])


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if kind is None else str(kind)


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind, custom_error_type="item", custom_error_message=f"the items of this server are {ITEMS}"),
]


# ---- the request


class ResponseTool(Body):
    """A function that the model may call."""

    type: Literal["function"] = Field(description="only functions are supported")
    name: Name
    description: LongText | None = None
    parameters: dict[str, Any] | None = Field(None, description="the JSON schema of its arguments")
    strict: bool | None = None


class ResponseToolChoice(Body):
    type: Literal["function"]
    name: Name


class TextFormat(Body):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: LongText | None = Field(None, description="accepted, and without effect")
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="objects have no other properties than the named ones; enforced is a schema always")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        given = {name for name in ("name", "description", "schema_", "strict") if getattr(self, name) is not None}
        if self.type != "json_schema" and given:
            raise ValueError(f"{min(given).rstrip('_')}: only type json_schema takes it")
        if self.type == "json_schema" and not {"name", "schema_"} <= given:
            raise ValueError("schema: type json_schema needs it, and a name")
        return self


class TextChoice(Body):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = Field(None, description="accepted, and without effect")


class ReasoningChoice(Body):
    effort: Short | None = Field(None, description="a value that the chat template knows")
    summary: Literal["auto"] | None = Field(None, description="accepted, and without effect: what a model thinks is sent as it is")
    generate_summary: Literal["auto"] | None = Field(None, description="accepted, and without effect")


class ResponseStreamOptions(Body):
    include_obfuscation: bool | None = Field(None, description="accepted, and without effect")


class ResponseRequest(Generated):
    lacking: ClassVar[dict[str, str]] = LACKING

    input: LongText | Annotated[list[InputItem], Field(min_length=1, max_length=MESSAGES)]
    instructions: LongText | None = Field(None, description="a system message before all others; it is not kept for the next response")
    previous_response_id: str | None = Field(None, max_length=1000, description="the response whose conversation this one continues")
    store: bool | None = Field(None, description="keep the response for later requests, which is the default")
    max_output_tokens: int | None = Field(None, ge=1, lt=MAX_NUMBER)
    include: list[Literal["message.output_text.logprobs"]] | None = Field(None, max_length=16)
    top_logprobs: int | None = Field(None, ge=0, le=1024)
    text: TextChoice | None = None
    tools: list[ResponseTool] | None = Field(None, max_length=TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningChoice | None = None
    truncation: Literal["disabled"] | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: dict[Short, Short] | None = Field(None, max_length=64, description="sent back")
    prompt_cache_retention: Literal["in_memory"] | None = Field(None, description="accepted, and without effect")
    background: Literal[False] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=VARIABLES, description="variables for the template")

    @property
    def logprobs(self) -> bool:
        return bool(self.include)

    @property
    def items(self) -> list[MessageItem | CallItem | ResultItem | ReasoningItem]:
        return [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
