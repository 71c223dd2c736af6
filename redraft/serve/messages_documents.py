"""The forms of answers of Anthropic's Messages interface in the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, RootModel

from redraft.serve.documents import Form, RequestMetrics


class MessageErrorBody(BaseModel):
    type: str
    message: str


class MessageError(BaseModel):
    """The error. request_id: of the reply that it ended."""

    type: Literal["error"]
    error: MessageErrorBody
    request_id: str | None


class MessageTokenCount(Form):
    input_tokens: int


class MessageUsage(Form):
    """The tokens of the prompt are the sum of the first three."""

    input_tokens: int = Field(description="of the prompt, not found in the prefix cache")
    cache_read_input_tokens: int = Field(description="of the prompt, found in the prefix cache")
    cache_creation_input_tokens: Literal[0] = Field(description="prefixes are kept without a mark, and are not counted")
    output_tokens: int


class MessageTextBlock(Form):
    type: Literal["text"]
    text: str


class MessageToolUseBlock(Form):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageThinkingBlock(Form):
    type: Literal["thinking"]
    thinking: str
    signature: str


ContentBlock = Annotated[MessageTextBlock | MessageToolUseBlock | MessageThinkingBlock, Field(discriminator="type")]
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class MessageReply(Form):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    metrics: RequestMetrics | None = None


# ---- the data of events


class MessageStart(Form):
    type: Literal["message_start"]
    message: MessageReply


class MessageBlockStart(Form):
    type: Literal["content_block_start"]
    index: int
    content_block: ContentBlock


class MessageTextDelta(Form):
    type: Literal["text_delta"]
    text: str


class MessageInputDelta(Form):
    type: Literal["input_json_delta"]
    partial_json: str


class MessageThinkingDelta(Form):
    type: Literal["thinking_delta"]
    thinking: str


class MessageSignatureDelta(Form):
    type: Literal["signature_delta"]
    signature: str


class MessageBlockDelta(Form):
    type: Literal["content_block_delta"]
    index: int
    delta: Annotated[MessageTextDelta | MessageInputDelta | MessageThinkingDelta | MessageSignatureDelta, Field(discriminator="type")]


class MessageBlockStop(Form):
    type: Literal["content_block_stop"]
    index: int


class MessageStopped(Form):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Form):
    type: Literal["message_delta"]
    delta: MessageStopped
    usage: MessageUsage
    metrics: RequestMetrics


class MessageStop(Form):
    type: Literal["message_stop"]


class MessagePing(Form):
    type: Literal["ping"]


MessageEventForm = MessageStart | MessageBlockStart | MessageBlockDelta | MessageBlockStop | MessageDelta | MessageStop | MessagePing


class MessageEvent(RootModel[Annotated[MessageEventForm, Field(discriminator="type")]]):
    """The data of an event of a stream. The event has the name of its type."""
