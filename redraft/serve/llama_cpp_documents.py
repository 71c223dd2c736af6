"""The forms of answers of llama.cpp's interface in the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from redraft.serve.documents import Form


class LlamaErrorBody(BaseModel):
    code: int
    message: str
    type: str


class LlamaError(BaseModel):
    error: LlamaErrorBody


class LlamaTimings(Form):
    """Of a text. predicted_ms: from its first token to its last."""

    cache_n: int = Field(description="tokens of the prompt that were found in the prefix cache")
    prompt_n: int = Field(description="the others")
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    draft_n: int | None = Field(None, description="drafted tokens, if there are any")
    draft_n_accepted: int | None = None


class LlamaToken(Form):
    id: int
    token: str
    bytes: list[int]
    logprob: float


class LlamaProbability(LlamaToken):
    top_logprobs: list[LlamaToken]


class LlamaPiece(Form):
    """Of a stream, but for the last event of a text."""

    index: int
    content: str
    tokens: list[int]
    stop: bool
    tokens_predicted: int
    tokens_evaluated: int
    completion_probabilities: list[LlamaProbability] | None = None
    timings: LlamaTimings | None = None


class LlamaSettings(Form):
    """What a text is sampled by."""

    n_ctx: int
    n_predict: int = Field(description="-1: as many as there is room for")
    max_tokens: int = Field(description="the same")
    seed: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    ignore_eos: bool
    stop: list[str]
    stream: bool
    n_probs: int
    grammar: str
    top_n_sigma: float
    xtc_probability: float
    xtc_threshold: float
    dynatemp_range: float
    dynatemp_exponent: float
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: list[str]
    samplers: list[str]


class LlamaCompletion(LlamaPiece):
    """A whole text, or the last event of one."""

    model: str
    generation_settings: LlamaSettings
    prompt: str
    has_new_line: bool
    truncated: bool = Field(description="the text ended because the context did")
    stop_type: Literal["eos", "limit", "word"]
    stopping_word: str
    tokens_cached: int


class LlamaSelected(BaseModel):
    """The fields that `response_fields` names; a/b is the field b of the object a."""

    model_config = ConfigDict(extra="allow")


LlamaReply = LlamaCompletion | LlamaSelected | list[LlamaCompletion | LlamaSelected]


class LlamaDefaults(Form):
    n_ctx: int
    params: LlamaSettings


class LlamaModalities(Form):
    vision: bool
    audio: bool


class LlamaProps(Form):
    default_generation_settings: LlamaDefaults
    total_slots: int = Field(description="texts that run at once")
    model_alias: str
    model_path: str = Field(description="the name of the model: paths are not shown")
    chat_template: str
    chat_template_caps: dict[str, Any]
    modalities: LlamaModalities
    bos_token: str
    eos_token: str
    build_info: str
    is_sleeping: bool


class LlamaPrompt(Form):
    prompt: str
