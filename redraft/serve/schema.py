"""The bodies that clients may send. An unknown field is an error that names it, and so is an OpenAI field that is not supported."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_NUMBER = 1 << 31  # of numbers that count something
MESSAGES = 4096  # of a conversation
CONTENT_PARTS = 1024  # of a message or a prediction
TOOL_CALLS = 128  # of a message
VARIABLES = 64  # of a chat template
LongText = Annotated[str, Field(max_length=64 << 20)]
Short = Annotated[str, Field(max_length=1000)]
Token = Annotated[int, Field(ge=0, lt=MAX_NUMBER)]
Id = Annotated[str, Field(pattern=r"^\d{1,10}$")]
Method = Annotated[str, Field(max_length=200)]

LACKING = {
    "audio": "speech", "best_of": "best_of", "function_call": "tools", "functions": "tools", "logit_processors": "processors",
    "modalities": "other modalities than text", "suffix": "filling in the middle", "tool_choice": "tools", "tools": "tools",
    "guided_json": "grammars", "guided_regex": "grammars", "guided_choice": "grammars",
    "guided_grammar": "grammars", "structured_outputs": "grammars", "use_beam_search": "beam search", "web_search_options": "web search",
    "reasoning_effort": "reasoning effort", "length_penalty": "beam search", "chat_template": "templates from clients",
    "lora_path": "paths from clients",
}  # fmt: skip
NEUTRAL: dict[str, Any] = {"best_of": 1, "tool_choice": "none", "function_call": "none", "suffix": "", "modalities": ["text"]}
NO_FIELDS: dict[str, Any] = {"additionalProperties": {"type": "null"}}  # fields that are not described may be null


class Body(BaseModel):
    """A JSON object of a request. A field that is null counts as not given; an unknown field with a value is refused by name. Of
    LACKING also [], false and the NEUTRAL value count as not given."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), json_schema_extra=NO_FIELDS)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if not cls._neutral(name, value)}

    @classmethod
    def _neutral(cls, name: str, value: Any) -> bool:
        """Whether the field requests nothing."""
        if value is None:
            return True
        if name not in LACKING:
            return False
        if not _empty(value) and not (value == NEUTRAL.get(name) and type(value) is type(NEUTRAL.get(name))):
            raise ValueError(f"{name}: this server does not support {LACKING[name]}")
        return True


def near_field(name: str, around: Iterable[str]) -> str | None:
    """The field most like the unknown field `name`, of a body that has all other fields of the object `around`; None if there is none."""
    known, kinds = set[str](), [Body]
    for kind in kinds:
        kinds += kind.__subclasses__()
        if set(around) - {name} <= kind.model_fields.keys():
            known |= kind.model_fields.keys()
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
    return near[0] if near else None


def _empty(value: Any) -> bool:
    return value is None or value is False or value == []


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="a last chunk holds the usage")
    include_obfuscation: bool | None = Field(None, description="accepted, and without effect")


class Replied(Body):
    """A part of a conversation. A client sends replies back as it got them, so unknown fields that hold nothing are allowed."""

    @classmethod
    def _neutral(cls, name: str, value: Any) -> bool:
        return (name not in cls.model_fields and _empty(value)) or super()._neutral(name, value)


class ContentPart(Replied):
    type: Literal["text"] = Field(description="only text is supported")
    text: LongText


class Prediction(Body):
    """A text that the reply is expected to resemble. Its tokens are drafted. They do not change the reply."""

    type: Literal["content"] | None = None
    content: LongText | Annotated[list[ContentPart], Field(max_length=CONTENT_PARTS)]

    @property
    def text(self) -> str:
        return _joined(self.content)


class SpeculationChoice(Body):
    """How this request is drafted and verified. A field that is not given is the server's choice."""

    method: Method | None = Field(None, description="name:option=value of a drafter, see `redraft methods`")
    budget: int | None = Field(None, ge=0, le=1024, description="maximum of drafted tokens in a step")
    verifier: Method | None = Field(None, description="name:option=value of a verifier")


class CacheChoice(Body):
    """Policies of this request's cache. A field that is not given is the server's choice."""

    keep: Method | None = Field(None, description="name:option=value of an eviction method, or none")
    codec: Method | None = Field(None, description="name:option=value of a quantization of the cache, or none")
    read: Method | None = Field(None, description="name:option=value of a sparse attention method, or none")


class ResponseFormat(Body):
    type: Literal["text"] = Field(description="only plain text is supported")


class Sampled(Body):
    """Fields that completions and chats have in common."""

    model: str | None = Field(None, max_length=400, description="a name of /v1/models; without it, the one that is served")
    n: int | None = Field(None, ge=1, le=1024)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="0: the likeliest token alone")
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stop: Short | Annotated[list[Short], Field(max_length=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[Id, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=4096, description="token id -> added to its logit"
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    user: str | None = Field(None, max_length=1000, description="accepted, and without effect")
    safety_identifier: str | None = Field(None, max_length=1000, description="accepted, and without effect")
    prompt_cache_key: str | None = Field(None, max_length=1000, description="accepted, and without effect: equal prefixes share anyway")
    service_tier: Literal["auto", "default"] | None = Field(None, description="accepted, and without effect")
    prediction: Prediction | None = None
    # the field's extensions
    top_k: int | None = Field(None, ge=-1, lt=MAX_NUMBER)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    typical_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    min_tokens: int | None = Field(None, ge=0, lt=MAX_NUMBER)
    ignore_eos: bool | None = None
    stop_token_ids: list[Token] | None = Field(None, max_length=1024)
    bad_words: list[Annotated[str, Field(max_length=100)]] | None = Field(None, max_length=64)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=1024)
    cache_salt: str | None = Field(None, max_length=1000, description="requests share cached prefixes only with the same salt")
    priority: int | None = Field(None, ge=-MAX_NUMBER, lt=MAX_NUMBER, description="lower numbers run first")
    return_token_ids: bool | None = None
    # ours
    speculation: Literal["off"] | SpeculationChoice | None = Field(None, description='"off", or how to draft and verify')
    cache: CacheChoice | None = None
    provenance: bool | None = Field(None, description="the reply names each token's drafter, its probability, and the tree of each step")


class CompletionRequest(Sampled):
    best_of: Literal[1] | None = None
    use_beam_search: Literal[False] | None = None
    prompt: LongText | list[LongText] | list[Token] | list[list[Token]]
    max_tokens: int | None = Field(None, ge=0, lt=MAX_NUMBER, description="16 if it is not given; 0 only with echo")
    logprobs: int | None = Field(None, ge=0, le=1024)
    echo: bool | None = None
    add_special_tokens: bool | None = Field(None, description="add tokens such as <s> around the prompt, as the checkpoint does")


class FunctionCall(Replied):
    name: Annotated[str, Field(min_length=1, max_length=1000)]
    arguments: LongText | dict[str, Any] | None = Field(None, description="a JSON object, or its text")


class ToolCall(Replied):
    """A function that the assistant called in an earlier turn."""

    id: str | None = Field(None, max_length=1000)
    type: Literal["function"] | None = None
    index: int | None = Field(None, ge=0, lt=MAX_NUMBER, description="accepted, and without effect")
    function: FunctionCall

    def plain(self) -> dict[str, Any]:
        """As templates read it."""
        made: dict[str, Any] = {"type": "function", "function": {"name": self.function.name, "arguments": self.function.arguments}}
        return made | ({"id": self.id} if self.id is not None else {})


class Message(Replied):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: LongText | Annotated[list[ContentPart], Field(max_length=CONTENT_PARTS)] | None = None
    name: str | None = Field(None, max_length=1000)
    refusal: LongText | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=TOOL_CALLS, description="of role assistant: calls of an earlier turn")
    tool_call_id: str | None = Field(None, max_length=1000, description="of role tool: the call whose result this is")

    @model_validator(mode="after")
    def _in_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: only the role assistant has them, not {self.role}")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"tool_call_id: only the role tool has it, not {self.role}")
        return self

    def plain(self) -> dict[str, Any]:
        """As templates read it."""
        made: dict[str, Any] = {"role": self.role, "content": _joined(self.content or "")}
        made |= {name: value for name in ("name", "tool_call_id") if (value := getattr(self, name)) is not None}
        return made | ({"tool_calls": [call.plain() for call in self.tool_calls]} if self.tool_calls else {})


def _joined(content: str | list[ContentPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class ChatRequest(Sampled):
    use_beam_search: Literal[False] | None = None
    tools: list[Any] | None = Field(None, max_length=0, description="none are offered")
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="accepted, and without effect: tools are not supported")
    modalities: list[Literal["text"]] | None = Field(None, min_length=1, max_length=1)
    messages: list[Message] = Field(min_length=1, max_length=MESSAGES)
    max_tokens: int | None = Field(None, ge=1, lt=MAX_NUMBER)
    max_completion_tokens: int | None = Field(None, ge=1, lt=MAX_NUMBER)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=1024)
    response_format: ResponseFormat | None = None
    metadata: dict[Short, Short] | None = Field(None, max_length=64, description="accepted, and without effect")
    store: Literal[False] | None = Field(None, description="nothing is stored")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(None, description="the reply continues the last message")
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=VARIABLES, description="variables for the template")


class EmbeddingRequest(Body):
    model: str | None = Field(None, max_length=400)
    input: LongText | list[LongText] | list[Token] | list[list[Token]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, lt=MAX_NUMBER, description="as many as the model has; fewer are not supported")
    user: str | None = Field(None, max_length=1000)
    pooling: Literal["last", "mean"] | None = Field(None, description="of the hidden states after the final norm; last by default")
    normalize: bool | None = Field(None, description="to length 1, which is the default")
    priority: int | None = Field(None, ge=-MAX_NUMBER, lt=MAX_NUMBER)
    cache_salt: str | None = Field(None, max_length=1000)


class TokenizeRequest(Body):
    """`prompt` or `messages`."""

    model: str | None = Field(None, max_length=400)
    prompt: LongText | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MESSAGES)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=VARIABLES)
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = Field(None, max_length=400)
    tokens: list[Token] = Field(max_length=1 << 20)


class AdapterRequest(Body):
    lora_name: str = Field(max_length=400, description="name of a subfolder of --lora-dir, and of the adapter as a model")
