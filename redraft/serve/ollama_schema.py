"""The bodies of Ollama's interface."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from redraft.serve import schema
from redraft.serve.llama_options import LlamaOptions, Number
from redraft.serve.schema import MAX_NUMBER, MESSAGES, TOOL_CALLS, TOOLS, Body, LongText, Replied, only_true

Name = Annotated[str, Field(min_length=1, max_length=400)]
Placed = Annotated[int, Field(gt=-MAX_NUMBER, lt=MAX_NUMBER)] | bool | None  # of options that place a model on a machine
PLACED = Field(None, description="accepted, and without effect: the server's own setting holds")


class Options(LlamaOptions):
    num_predict: int | None = Field(None, ge=-2, lt=MAX_NUMBER, description="new tokens; 0 and less: as many as there is room for")
    num_ctx: int | None = Field(None, ge=0, lt=MAX_NUMBER, description="at most the server's own, which holds")
    num_keep: int | None = Field(None, ge=-1, lt=MAX_NUMBER, description="accepted, and without effect: no token is ever dropped")
    penalize_newline: Annotated[bool, AfterValidator(only_true)] | None = Field(None, description="penalties see newlines too")
    num_batch: Placed = PLACED
    num_gpu: Placed = PLACED
    main_gpu: Placed = PLACED
    num_thread: Placed = PLACED
    numa: Placed = PLACED
    low_vram: Placed = PLACED
    f16_kv: Placed = PLACED
    logits_all: Placed = PLACED
    vocab_only: Literal[False] | None = None
    embedding_only: Literal[False] | None = None
    use_mmap: Placed = PLACED
    use_mlock: Placed = PLACED


class Request(Body):
    model: Name = Field(description="a name of /api/tags, with or without :latest")
    options: Options | None = None
    keep_alive: Number | Annotated[str, Field(max_length=100)] = Field(None, description="accepted, and without effect")


class TextRequest(Request):
    stream: bool | None = Field(None, description="true by default")
    format: Literal["", "json"] | dict[str, Any] | None = Field(None, description="json, or a JSON schema")
    think: bool | Literal["low", "medium", "high"] | None = Field(None, description="whether to reason, if the model can")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=1024)


class GenerateRequest(TextRequest):
    lacking: ClassVar[dict[str, str]] = {
        "images": "images", "template": "templates from clients", "context": "context, but messages of /api/chat",
        "width": "making images", "height": "making images", "steps": "making images", "truncate": "cutting of prompts",
        "shift": "moving of contexts",
    }  # fmt: skip
    neutral: ClassVar[dict[str, Any]] = {"template": ""}

    prompt: LongText | None = Field(None, description="without it, the reply says that the model is loaded")
    suffix: LongText | None = Field(None, description="the text after the new text, which fills what is between")
    system: LongText | None = None
    raw: bool | None = Field(None, description="continue the prompt without a chat template")


class Called(Replied):
    name: Annotated[str, Field(min_length=1, max_length=1000)]
    arguments: dict[str, Any] | None = None
    description: LongText | None = Field(None, description="accepted, and without effect")
    index: int | None = Field(None, ge=0, lt=MAX_NUMBER, description="accepted, and without effect")


class Call(Replied):
    """A function that the assistant called in an earlier turn."""

    id: str | None = Field(None, max_length=1000)
    type: Literal["function"] | None = None
    function: Called


class Message(Replied):
    lacking: ClassVar[dict[str, str]] = {"images": "images"}

    role: Literal["system", "user", "assistant", "tool"]
    content: LongText | None = None
    thinking: LongText | None = Field(None, description="of role assistant: the reasoning of an earlier turn")
    tool_calls: list[Call] | None = Field(None, max_length=TOOL_CALLS, description="of role assistant: calls of an earlier turn")
    tool_name: str | None = Field(None, max_length=1000, description="of role tool: the function whose result this is")
    tool_call_id: str | None = Field(None, max_length=1000, description="of role tool: the call whose result this is")

    @model_validator(mode="after")
    def _in_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: only the role assistant has them, not {self.role}")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"tool_call_id: only the role tool has it, not {self.role}")
        return self

    def plain(self) -> dict[str, Any]:
        """As a message of a chat."""
        calls = [{"id": call.id, "type": "function", "function": call.function.model_dump(exclude={"description", "index"})}
                 for call in self.tool_calls or ()]  # fmt: skip
        made = {"role": self.role, "content": self.content or "", "name": self.tool_name, "tool_call_id": self.tool_call_id}
        return made | {"reasoning_content": self.thinking, "tool_calls": calls or None}


class Tool(schema.Tool):
    type: Literal["function"] | None = None  # type: ignore[assignment]

    def plain(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}


class ChatRequest(TextRequest):
    lacking: ClassVar[dict[str, str]] = {"truncate": "cutting of prompts", "shift": "moving of contexts"}

    messages: list[Message] | None = Field(None, max_length=MESSAGES, description="without any, the reply says that the model is loaded")
    tools: list[Tool] | None = Field(None, max_length=TOOLS)


class EmbedRequest(Request):
    lacking: ClassVar[dict[str, str]] = {"truncate": "cutting of texts: one that is too long is refused"}

    input: LongText | list[LongText]
    dimensions: int | None = Field(None, ge=1, lt=MAX_NUMBER, description="as many as the model has; fewer are not supported")


class ShowRequest(Body):
    model: Name
    verbose: bool | None = Field(None, description="accepted, and without effect: the reply is whole")
