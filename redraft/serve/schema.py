"""What clients may send. Unknown fields are errors that name them; so are fields of OpenAI's that this server cannot honour."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST = 1 << 31  # of numbers that count something
Text = Annotated[str, Field(max_length=64 << 20)]
Short = Annotated[str, Field(max_length=1000)]
Token = Annotated[int, Field(ge=0, lt=MOST)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Id = Annotated[str, Field(pattern=r"^\d{1,10}$")]

LACKING = {
    "audio": "speech", "best_of": "best_of", "function_call": "tools", "functions": "tools", "logit_processors": "processors",
    "modalities": "other modalities than text", "suffix": "filling in the middle", "tool_choice": "tools", "tools": "tools",
    "parallel_tool_calls": "tools", "guided_json": "grammars", "guided_regex": "grammars", "guided_choice": "grammars",
    "guided_grammar": "grammars", "structured_outputs": "grammars", "use_beam_search": "beam search", "web_search_options": "web search",
    "reasoning_effort": "reasoning effort", "length_penalty": "beam search", "chat_template": "templates from clients",
}  # fmt: skip
NEUTRAL: dict[str, Any] = {"best_of": 1, "use_beam_search": False, "tools": [], "tool_choice": "none", "modalities": ["text"]}


class Body(BaseModel):
    """A request's body: nothing unknown, and what is null counts as not given; so does what asks for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    _echoed: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, what in LACKING.items():
            value, neutral = values.get(name), NEUTRAL.get(name)
            if value is not None and (value != neutral or type(value) is not type(neutral)):
                raise ValueError(f"{name}: this server does not offer {what}")
        return {name: value for name, value in values.items() if value is not None or (not cls._echoed and name not in LACKING)}


class StreamOptions(Body):
    include_usage: bool = Field(False, description="a last chunk tells the usage")
    include_obfuscation: bool = Field(False, description="accepted, and without effect")


class ContentPart(Body):
    type: Literal["text"] = Field(description="only text is read")
    text: Text


class Prediction(Body):
    """What the reply is expected to be close to; its tokens are drafted, and decide nothing."""

    type: Literal["content"] = "content"
    content: Text | list[ContentPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class SpeculationChoice(Body):
    """How this request's text is drafted and verified; what is not given is the server's choice."""

    method: str | None = Field(None, max_length=200, description="name:option=value,... of a drafter, see `redraft methods`")
    budget: int | None = Field(None, ge=0, le=1024, description="drafted tokens a step at most")
    verifier: str | None = Field(None, max_length=200, description="name:option=value,... of a verifier")


class CacheChoice(Body):
    """Policies of this request's cache; what is not given is the server's choice."""

    keep: str | None = Field(None, max_length=200, description="name:option=value,... of what is kept, or none")
    codec: str | None = Field(None, max_length=200, description="name:option=value,... of the form in which it is stored, or none")
    read: str | None = Field(None, max_length=200, description="name:option=value,... of how it is read, or none")


class ResponseFormat(Body):
    type: Literal["text"] = Field(description="only plain text is offered")


class Sampled(Body):
    """What completions and chats have in common."""

    model: str | None = Field(None, max_length=400, description="a name of /v1/models; without it, the one that is served")
    n: int | None = Field(None, ge=1, le=1024)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stop: Short | list[Short] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[Id, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, description="token id -> added to its logit")
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    user: str | None = Field(None, max_length=1000, description="accepted, and without effect")
    safety_identifier: str | None = Field(None, max_length=1000, description="accepted, and without effect")
    prompt_cache_key: str | None = Field(None, max_length=1000, description="accepted, and without effect: equal prefixes share anyway")
    service_tier: Literal["auto", "default"] | None = Field(None, description="accepted, and without effect")
    prediction: Prediction | None = None
    # the field's extensions
    top_k: int | None = Field(None, ge=-1, lt=MOST)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    typical_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    min_tokens: int | None = Field(None, ge=0, lt=MOST)
    ignore_eos: bool | None = None
    stop_token_ids: list[Token] | None = Field(None, max_length=1024)
    bad_words: list[Annotated[str, Field(max_length=100)]] | None = Field(None, max_length=64)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=1024)
    cache_salt: str | None = Field(None, max_length=1000, description="who does not give the same shares no cached prefix")
    priority: int | None = Field(None, ge=-MOST, lt=MOST, description="the lower, the sooner it runs")
    return_token_ids: bool | None = None
    # ours
    speculation: Literal["off"] | SpeculationChoice | None = Field(None, description='"off", or how to draft and verify')
    cache: CacheChoice | None = None
    provenance: bool | None = Field(None, description="tell of each token who drafted it, its probability, and the step's tree")


class CompletionRequest(Sampled):
    best_of: Literal[1] | None = None
    use_beam_search: Literal[False] | None = None
    prompt: Text | list[Text] | list[Token] | list[list[Token]]
    max_tokens: int | None = Field(None, ge=0, lt=MOST, description="16 where it is not given; 0 only with echo")
    logprobs: int | None = Field(None, ge=0, le=1024)
    echo: bool | None = None
    add_special_tokens: bool | None = Field(None, description="put <s> and the like around the prompt, as the checkpoint does")


class Message(Body):
    _echoed: ClassVar[bool] = True  # replies come back as clients hold them, with all that is null in them

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart] | None = None
    name: str | None = Field(None, max_length=1000)
    refusal: Text | None = None

    def plain(self) -> dict[str, str]:
        """As templates read it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name is not None else {})


class ChatRequest(Sampled):
    use_beam_search: Literal[False] | None = None
    tools: list[Any] | None = Field(None, max_length=0, description="none are offered")
    tool_choice: Literal["none"] | None = None
    modalities: list[Literal["text"]] | None = Field(None, min_length=1, max_length=1)
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=MOST)
    max_completion_tokens: int | None = Field(None, ge=1, lt=MOST)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=1024)
    response_format: ResponseFormat | None = None
    metadata: dict[Text, Text] | None = Field(None, description="accepted, and without effect")
    store: Literal[False] | None = Field(None, description="nothing is stored")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(None, description="the reply goes on with the last message")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="variables for the template")


class EmbeddingRequest(Body):
    model: str | None = Field(None, max_length=400)
    input: Text | list[Text] | list[Token] | list[list[Token]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, lt=MOST, description="as many as the model has; no fewer are offered")
    user: str | None = Field(None, max_length=1000)
    pooling: Literal["last", "mean"] | None = Field(None, description="of the hidden states behind the final norm; last by default")
    normalize: bool | None = Field(None, description="to length 1, which is the default")
    priority: int | None = Field(None, ge=-MOST, lt=MOST)
    cache_salt: str | None = Field(None, max_length=1000)


class TokenizeRequest(Body):
    """`prompt` or `messages`."""

    model: str | None = Field(None, max_length=400)
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = Field(None, max_length=400)
    tokens: list[Token]
