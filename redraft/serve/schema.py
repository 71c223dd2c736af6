"""The bodies that clients may send. An unknown field is an error that names it, and so is an OpenAI field that is not supported."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from redraft.config import is_utf8

MAX_NUMBER = 1 << 31  # of numbers that count something
MESSAGES = 4096  # of a conversation
SEGMENTS = 1024  # of a prompt
CONTENT_PARTS = 1024  # of a message or a prediction
TOOL_CALLS = 128  # of a message
TOOLS = 128  # of a request
TOOLS_SIZE = 1 << 18  # characters of all tools as JSON
VARIABLES = 64  # of a chat template
LongText = Annotated[str, Field(max_length=64 << 20)]
Short = Annotated[str, Field(max_length=1000)]
Token = Annotated[int, Field(ge=0, lt=MAX_NUMBER)]
Id = Annotated[str, Field(pattern=r"^\d{1,10}$")]
Method = Annotated[str, Field(max_length=200)]

LACKING = {
    "audio": "speech", "best_of": "best_of", "function_call": "it, but tool_choice", "functions": "it, but tools",
    "logit_processors": "processors", "modalities": "other modalities than text",
    "guided_json": "it, but structured_outputs", "guided_regex": "it, but structured_outputs",
    "guided_choice": "it, but structured_outputs", "guided_grammar": "it, but structured_outputs",
    "use_beam_search": "beam search", "web_search_options": "web search",
    "grammar": "it here, but structured_outputs", "json_schema": "it here, but response_format",
    "length_penalty": "beam search", "chat_template": "templates from clients",
    "lora_path": "paths from clients",
}  # fmt: skip
NEUTRAL: dict[str, Any] = {"best_of": 1, "function_call": "none", "modalities": ["text"]}
NO_FIELDS: dict[str, Any] = {"additionalProperties": {"type": "null"}}  # fields that are not described may be null


def only_true(given: bool) -> bool:
    """The same, if it is true. ValueError for false."""
    if not given:
        raise ValueError("this server supports true only")
    return given


class Body(BaseModel):
    """A JSON object of a request. A field that is null counts as not given; an unknown field with a value is refused by name. Of
    `lacking` also [], false and the neutral value count as not given."""

    lacking: ClassVar[dict[str, str]] = LACKING  # fields of the interface that are not offered
    neutral: ClassVar[dict[str, Any]] = NEUTRAL
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), json_schema_extra=NO_FIELDS)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if odd := next((name for name in values if not is_utf8(name)), None):
            raise ValueError(f"unknown field {odd!r}")
        return {name: value for name, value in values.items() if not cls._neutral(name, value)}

    @classmethod
    def _neutral(cls, name: str, value: Any) -> bool:
        """Whether the field requests nothing."""
        if value is None:
            return True
        if name not in cls.lacking:
            return False
        neutral = cls.neutral.get(name)
        if not _empty(value) and not (value == neutral and isinstance(value, bool) == isinstance(neutral, bool)):
            raise ValueError(f"{name}: this server does not support {cls.lacking[name]}")
        return True


def near_field(name: str, around: Iterable[str]) -> str | None:
    """The field most like the unknown field `name`, of a body that has all other fields of the object `around`; None if there is none."""
    known, kinds = set[str](), [Body]
    for kind in kinds:
        kinds += kind.__subclasses__()
        fields = {field.alias or own for own, field in kind.model_fields.items()}
        if set(around) - {name} <= fields:
            known |= fields
    near = difflib.get_close_matches(name, sorted(known - {name}), n=1, cutoff=0.7)
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


class JsonSchema(Body):
    """A schema that the reply must match."""

    name: Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]
    description: LongText | None = Field(None, description="accepted, and without effect")
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = Field(None, description="objects have no other properties than the named ones; enforced is a schema always")


class ResponseFormat(Body):
    lacking: ClassVar[dict[str, str]] = {}
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="with json_object, as llama.cpp has it: its schema")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.json_schema is None) != (self.type != "json_schema"):
            raise ValueError("json_schema: type json_schema needs it, and no other type takes it")
        if self.schema_ is not None and self.type != "json_object":
            raise ValueError("schema: only type json_object takes it; that of json_schema is in json_schema")
        return self


class StructuredOutputs(Body):
    """What the text must be: one of these."""

    lacking: ClassVar[dict[str, str]] = {}
    json_: dict[str, Any] | bool | LongText | None = Field(None, alias="json", description="a JSON schema, or its text")
    json_object: bool | None = None
    regex: LongText | None = Field(None, description="the whole text matches it; Rust's syntax")
    choice: list[LongText] | None = Field(None, min_length=1, max_length=4096)
    grammar: LongText | None = Field(None, description="in Lark's form, or in GBNF")


class Tuned(Body):
    """How a text is sampled and where it stops: fields with the same name in all interfaces."""

    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="0: the likeliest token alone")
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stop: Short | Annotated[list[Short], Field(max_length=1024)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, lt=MAX_NUMBER)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    typical_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_n_sigma: float | None = Field(None, ge=-1, le=1000, allow_inf_nan=False, description="0 or less: off")
    xtc_probability: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    xtc_threshold: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    dynatemp_range: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    dynatemp_exponent: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    mirostat: Literal[0, 2] | None = Field(None, description="2: mirostat 2.0; 0: off")
    mirostat_tau: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    mirostat_eta: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    dry_multiplier: float | None = Field(None, ge=0, le=1000, allow_inf_nan=False, description="0: DRY is off")
    dry_base: float | None = Field(None, ge=1, le=100, allow_inf_nan=False)
    dry_allowed_length: int | None = Field(None, ge=1, le=1 << 20)
    dry_penalty_last_n: int | None = Field(None, ge=-1, le=1 << 30, description="-1: the whole text; 0: off")
    dry_sequence_breakers: list[Annotated[str, Field(min_length=1, max_length=100)]] | None = Field(None, max_length=64)
    speculation: Literal["off"] | SpeculationChoice | None = Field(None, description='"off", or how to draft and verify')
    cache: Literal["off"] | CacheChoice | None = Field(None, description='"off", the whole cache, or policies for it')


class Generated(Tuned):
    """Fields of all requests for a text."""

    model: str | None = Field(None, max_length=400, description="a name of /v1/models; without it, the one that is served")
    stream: bool | None = None
    logit_bias: dict[Id, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=4096, description="token id -> added to its logit"
    )
    user: str | None = Field(None, max_length=1000, description="accepted, and without effect")
    safety_identifier: str | None = Field(None, max_length=1000, description="accepted, and without effect")
    prompt_cache_key: str | None = Field(None, max_length=1000, description="accepted, and without effect: equal prefixes share anyway")
    service_tier: Literal["auto", "default"] | None = Field(None, description="accepted, and without effect")
    prediction: Prediction | None = None
    structured_outputs: StructuredOutputs | None = None
    # the field's extensions
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    min_tokens: int | None = Field(None, ge=0, lt=MAX_NUMBER)
    ignore_eos: bool | None = None
    stop_token_ids: list[Token] | None = Field(None, max_length=1024)
    bad_words: list[Annotated[str, Field(max_length=100)]] | None = Field(None, max_length=64)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: str | None = Field(None, max_length=1000, description="requests share cached prefixes only with the same salt")
    priority: int | None = Field(None, ge=-MAX_NUMBER, lt=MAX_NUMBER, description="lower numbers run first")
    return_token_ids: bool | None = None
    # ours
    provenance: bool | None = Field(None, description="the reply names each token's drafter, its probability, and the tree of each step")


class Sampled(Generated):
    """Fields that completions and chats have in common."""

    n: int | None = Field(None, ge=1, le=1024)
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=1024)
    steer: Method | None = Field(None, description="name:option=value of a method that changes hidden states between layers, or none")
    control: Method | None = Field(
        None, description="name:option=value of what decides beside the model how the text goes on, several with + between them, or none"
    )
    reuse: Method | None = Field(None, description="name:option=value of a method that reuses the cache of segments in any order")


class CompletionRequest(Sampled):
    best_of: Literal[1] | None = None
    use_beam_search: Literal[False] | None = None
    prompt: LongText | list[LongText] | list[Token] | list[list[Token]] | None = None
    segments: list[LongText | list[Token]] | None = Field(
        None, min_length=2, max_length=SEGMENTS, description="instead of prompt: its parts, a head, chunks and the last part; see reuse"
    )
    prompt_embeds: LongText | list[LongText] | None = Field(
        None, description="instead of prompt: vectors [tokens, hidden size], base64 of an npy or a safetensors file"
    )
    suffix: LongText | None = Field(None, description="the text after the new text, which fills what is between; empty: none")
    max_tokens: int | None = Field(None, ge=0, lt=MAX_NUMBER, description="16 if it is not given; 0 only with echo")
    logprobs: int | None = Field(None, ge=0, le=1024)
    echo: bool | None = None
    add_special_tokens: bool | None = Field(None, description="add tokens such as <s> around the prompt, as the checkpoint does")

    @model_validator(mode="after")
    def _prompted(self) -> Self:
        for name in ("prompt", "prompt_embeds", "suffix", "echo"):
            if self.segments is not None and getattr(self, name):
                raise ValueError(f"{name}: segments exclude it")
        if self.prompt_embeds is None:
            if self.prompt is None and self.segments is None:
                raise ValueError("prompt: field required")
            return self
        for name in ("prompt", "suffix", "echo"):
            if getattr(self, name):
                raise ValueError(f"{name}: prompt_embeds excludes it")
        return self


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
    reasoning_content: LongText | None = Field(None, description="of role assistant: its reasoning in an earlier turn")
    tool_calls: list[ToolCall] | None = Field(None, max_length=TOOL_CALLS, description="of role assistant: calls of an earlier turn")
    tool_call_id: str | None = Field(None, max_length=1000, description="of role tool: the call whose result this is")

    @model_validator(mode="after")
    def _in_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: only the role assistant has them, not {self.role}")
        if self.reasoning_content is not None and self.role != "assistant":
            raise ValueError(f"reasoning_content: only the role assistant has it, not {self.role}")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"tool_call_id: only the role tool has it, not {self.role}")
        return self

    def plain(self) -> dict[str, Any]:
        """As templates read it."""
        made: dict[str, Any] = {"role": self.role, "content": _joined(self.content or "")}
        made |= {name: value for name in ("name", "reasoning_content", "tool_call_id") if (value := getattr(self, name)) is not None}
        return made | ({"tool_calls": [call.plain() for call in self.tool_calls]} if self.tool_calls else {})


def _joined(content: str | list[ContentPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class Function(Body):
    """A function that a model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: LongText | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema of its arguments, an object")
    strict: bool | None = Field(None, description="objects have no other properties than the named ones; enforced is a schema always")


class Tool(Body):
    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As templates read it."""
        given = {"name": self.function.name, "description": self.function.description, "parameters": self.function.parameters}
        return {"type": "function", "function": {name: value for name, value in given.items() if value is not None}}


class Named(Body):
    name: Annotated[str, Field(max_length=1000)]


class ToolChoice(Body):
    """The function that must be called."""

    type: Literal["function"]
    function: Named


class ChatRequest(Sampled):
    use_beam_search: Literal[False] | None = None
    tools: list[Tool] | None = Field(None, max_length=TOOLS, description="functions that the model may call")
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = Field(None, description="auto, if there are tools")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call")
    modalities: list[Literal["text"]] | None = Field(None, min_length=1, max_length=1)
    messages: list[Message] = Field(min_length=1, max_length=MESSAGES)
    segments: list[LongText] | None = Field(
        None, min_length=1, max_length=SEGMENTS, description="texts before that of the last user message, such as documents; see reuse"
    )
    max_tokens: int | None = Field(None, ge=1, lt=MAX_NUMBER)
    max_completion_tokens: int | None = Field(None, ge=1, lt=MAX_NUMBER)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=1024)
    metadata: dict[Short, Short] | None = Field(None, max_length=64, description="accepted, and without effect")
    store: Literal[False] | None = Field(None, description="nothing is stored")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(None, description="the reply continues the last message")
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=VARIABLES, description="variables for the template")
    reasoning_effort: Short | None = Field(None, description="a value that the chat template knows")

    @model_validator(mode="after")
    def _choosable(self) -> Self:
        names = [tool.function.name for tool in self.tools or ()]
        if twice := next((name for name, count in Counter(names).items() if count > 1), None):
            raise ValueError(f"tools: two have the name {twice}")
        if (size := len(json.dumps([tool.plain() for tool in self.tools or ()]))) > TOOLS_SIZE:
            raise ValueError(f"tools: they have {size} characters as JSON, at most {TOOLS_SIZE} are allowed")
        if self.tool_choice in (None, "none"):
            return self
        if not names:
            raise ValueError("tool_choice: it needs tools")
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: no tool has the name {self.tool_choice.function.name}")
        return self


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
    """`prompt`, `messages`, or `content`, which is llama.cpp's."""

    model: str | None = Field(None, max_length=400)
    prompt: LongText | None = None
    content: LongText | None = None
    add_special: bool | None = Field(None, description="of content: add tokens such as <s>; false by default")
    parse_special: Annotated[bool, AfterValidator(only_true)] | None = Field(None, description="special tokens are always read as such")
    with_pieces: bool | None = Field(None, description="tokens are objects with id and piece")
    messages: list[Message] | None = Field(None, min_length=1, max_length=MESSAGES)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=VARIABLES)
    tools: list[Tool] | None = Field(None, max_length=TOOLS)
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = Field(None, max_length=400)
    tokens: list[Token] = Field(max_length=1 << 20)


class AdapterRequest(Body):
    lora_name: str = Field(max_length=400, description="name of a subfolder of --lora-dir, and of the adapter as a model")
