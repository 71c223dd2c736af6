"""The bodies of Anthropic's Messages interface. What it has and this server does not offer is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from redraft.config import is_utf8
from redraft.serve.schema import (
    CONTENT_PARTS,
    MAX_NUMBER,
    MESSAGES,
    TOOLS,
    Body,
    CacheChoice,
    LongText,
    Replied,
    Short,
    SpeculationChoice,
)

ROLES = {"text": ("user", "assistant", "system"), "tool_result": ("user",), "tool_use": ("assistant",), "thinking": ("assistant",)}
WITHOUT_EFFECT = "accepted, and without effect"


def _encodable(text: str) -> str:
    if not is_utf8(text):
        raise ValueError("half of a surrogate pair is not allowed, UTF-8 cannot encode it")
    return text


StopText = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_encodable)]


class CacheControl(Body):
    """A mark in a prompt. It has no effect: equal prefixes share anyway."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Marked(Replied):
    """A part of a conversation that may have a mark for caches."""

    lacking = {"citations": "citations"}  # noqa: RUF012  # as pydantic reads it
    cache_control: CacheControl | None = Field(None, description=f"{WITHOUT_EFFECT}: equal prefixes share anyway")


class Text(Marked):
    type: Literal["text"]
    text: LongText


class Caller(Body):
    type: Literal["direct"]


class ToolUse(Marked):
    """A tool that the assistant called."""

    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1, max_length=1000)]
    name: Annotated[str, Field(min_length=1, max_length=1000)]
    input: dict[str, Any]
    caller: Caller | None = Field(None, description=WITHOUT_EFFECT)


class Thinking(Replied):
    """The assistant's reasoning."""

    type: Literal["thinking"]
    thinking: LongText
    signature: LongText | None = Field(None, description="accepted, and not checked")


def _offered(*kinds: str) -> BeforeValidator:
    """Refuses blocks of other types by name."""

    def check(value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str):
            raise ValueError("a block is needed, an object with a type")
        if kind not in kinds:
            raise ValueError(f"blocks of type {kind} are not supported here, only {', '.join(kinds)}")
        return value

    return BeforeValidator(check)


TextAlone = Annotated[Text, _offered("text")]


class ToolResult(Marked):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: Short
    content: LongText | Annotated[list[TextAlone], Field(max_length=CONTENT_PARTS)] | None = None
    is_error: bool | None = Field(None, description=f"{WITHOUT_EFFECT}: the content says what went wrong")


def _tag(block: Any) -> str:
    """A tag is no name of a field, so that the place of an error can be named."""
    return f"a {block['type'] if isinstance(block, dict) else block.type} block"


Block = Annotated[
    Annotated[Text, Tag("a text block")]
    | Annotated[ToolUse, Tag("a tool_use block")]
    | Annotated[ToolResult, Tag("a tool_result block")]
    | Annotated[Thinking, Tag("a thinking block")],
    Discriminator(_tag),
    _offered(*ROLES),
]


class Turn(Replied):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: LongText | Annotated[list[Block], Field(max_length=CONTENT_PARTS)]

    @model_validator(mode="after")
    def _in_role(self) -> Self:
        for block in self.blocks:
            if self.role not in ROLES[block.type]:
                raise ValueError(f"the role {self.role} has no blocks of type {block.type}")
        return self

    @property
    def blocks(self) -> list[Any]:
        return [Text(type="text", text=self.content)] if isinstance(self.content, str) else list(self.content)


def _of_client(value: Any) -> Any:
    """Refuses tools that a server would run."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in (None, "custom"):
        raise ValueError(f"tools of type {kind} are not supported, only those that the client runs")
    return value


class ClientTool(Body):
    """A tool that the client runs."""

    lacking = {"input_examples": "examples of inputs", "defer_loading": "searching for tools"}  # noqa: RUF012  # as pydantic reads it
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: LongText | None = None
    input_schema: dict[str, Any] = Field(description="a JSON schema of its input, an object")
    type: Literal["custom"] | None = None
    strict: bool | None = Field(None, description="objects have no other properties than the named ones; enforced is a schema always")
    cache_control: CacheControl | None = Field(None, description=WITHOUT_EFFECT)
    eager_input_streaming: bool | None = Field(None, description=f"{WITHOUT_EFFECT}: inputs are always streamed as they are written")
    allowed_callers: list[Literal["direct"]] | None = Field(None, max_length=1, description=WITHOUT_EFFECT)


class ToolUseChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[str, Field(max_length=1000)] | None = Field(None, description="of type tool: the tool to use")
    disable_parallel_tool_use: bool | None = Field(None, description="at most one call")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.name is None) != (self.type != "tool"):
            raise ValueError("type tool needs a name, and no other type takes one")
        return self


class ThinkingChoice(Body):
    """Whether a model that can reason does so before its reply. It sets the variables `enable_thinking` and `thinking` of the chat
    template; other models are not changed."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(None, ge=1, lt=MAX_NUMBER, description=f"{WITHOUT_EFFECT}: max_tokens limits all tokens")
    display: Literal["summarized", "omitted"] | None = Field(None, description="omitted: blocks of thinking have no text; else all of it")


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema", description="a JSON schema that the reply follows")


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(None, description="if the chat template knows one")
    format: OutputFormat | None = None


class Metadata(Body):
    user_id: Short | None = None


class Conversation(Body):
    """Fields of a request for a reply and of one that counts its tokens."""

    lacking: ClassVar[dict[str, str]] = {
        "container": "containers", "mcp_servers": "MCP servers", "context_management": "context management", "diagnostics": "diagnostics",
        "inference_geo": "a choice of regions", "speed": "a choice of speeds", "user_profile_id": "profiles of users",
    }  # fmt: skip
    model: str | None = Field(None, max_length=400, description="a name of /v1/models; without it, the one that is served")
    messages: list[Turn] = Field(min_length=1, max_length=MESSAGES)
    system: LongText | Annotated[list[TextAlone], Field(max_length=CONTENT_PARTS)] | None = None
    tools: list[Annotated[ClientTool, BeforeValidator(_of_client)]] | None = Field(None, max_length=TOOLS)
    tool_choice: ToolUseChoice | None = Field(None, description="auto, if there are tools")
    thinking: ThinkingChoice | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = Field(None, description=WITHOUT_EFFECT)


class MessagesRequest(Conversation):
    max_tokens: int = Field(ge=1, lt=MAX_NUMBER)
    stop_sequences: list[StopText] | None = Field(None, max_length=1024)
    temperature: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="0: the likeliest token alone")
    top_k: int | None = Field(None, ge=0, lt=MAX_NUMBER, description="0: all")
    stream: bool | None = None
    metadata: Metadata | None = Field(None, description=WITHOUT_EFFECT)
    service_tier: Literal["auto", "standard_only"] | None = Field(None, description=WITHOUT_EFFECT)
    # ours
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    speculation: Literal["off"] | SpeculationChoice | None = Field(None, description='"off", or how to draft and verify')
    cache: CacheChoice | None = None


class CountRequest(Conversation):
    """A conversation whose tokens are counted."""
