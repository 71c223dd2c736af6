"""The bodies of llama.cpp's interface."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from redraft.serve.llama_options import SAMPLERS, LlamaOptions, Number, neutral
from redraft.serve.schema import MAX_NUMBER, MESSAGES, TOOLS, VARIABLES, Body, LongText, Message, Short, Token, Tool

FILES = 1024  # of a request
Milliseconds = Annotated[int, Field(ge=-1, lt=MAX_NUMBER)]
Bias = Annotated[float, Field(ge=-1e6, le=1e6)] | Literal[False]
Part = Token | LongText
Pair = Annotated[tuple[Token | Short, Bias], BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given)]


class Options(LlamaOptions):
    """Fields of completions and of filling in the middle."""

    lacking: ClassVar[dict[str, str]] = {
        **LlamaOptions.lacking, "adaptive_target": "adaptive sampling", "min_keep": "min_keep",
        "n_discard": "moving of contexts", "post_sampling_probs": "probabilities after sampling",
        "return_progress": "progress of prompts", "lora": "scales of adapters, but model",
        "sse_ping_interval": "intervals of pings from clients",
    }  # fmt: skip
    neutral: ClassVar[dict[str, Any]] = {
        **LlamaOptions.neutral, "adaptive_target": -1, "min_keep": 0, "n_discard": 0,
    }  # fmt: skip

    model: str | None = Field(None, max_length=400, description="a name of /v1/models; without it, the one that is served")
    n_predict: int | None = Field(None, ge=-1, lt=MAX_NUMBER, description="new tokens; -1: as many as there is room for; 0: none")
    n_cmpl: int | None = Field(None, ge=1, le=1024, description="texts for each prompt")
    n_probs: int | None = Field(None, ge=0, le=1024, description="likeliest tokens at each place, by the model's own distribution")
    stream: bool | None = None
    grammar: LongText | None = Field(None, description="in GBNF or in Lark's form")
    json_schema: dict[str, Any] | bool | None = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[list[Pair], Field(max_length=4096)] | Annotated[dict[Short, Bias], Field(max_length=4096)] | None = Field(
        None, description="of token ids, or of all tokens of a text; false: never"
    )
    samplers: list[Literal[*SAMPLERS]] | None = Field(  # type: ignore[valid-type]
        None, max_length=64, description="fields of others have no effect; the order is Redraft's"
    )
    return_tokens: bool | None = None
    timings_per_token: bool | None = Field(None, description="every event has timings")
    response_fields: list[Short] | None = Field(None, max_length=64, description="only these fields, as field or field/field")
    n_keep: int | None = Field(None, ge=-1, lt=MAX_NUMBER, description="accepted, and without effect: no token is ever dropped")
    n_indent: int | None = Field(None, ge=0, lt=MAX_NUMBER, description="accepted, and without effect")
    n_cache_reuse: int | None = Field(None, ge=0, lt=MAX_NUMBER, description="accepted, and without effect: equal prefixes share anyway")
    cache_prompt: bool | None = Field(None, description="accepted, and without effect: equal prefixes share anyway")
    id_slot: int | None = Field(None, ge=-1, lt=MAX_NUMBER, description="accepted, and without effect: there are no slots")
    t_max_predict_ms: Milliseconds | None = Field(None, description="accepted, and without effect")
    t_max_prompt_ms: Milliseconds | None = Field(None, description="accepted, and without effect")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.grammar and self.json_schema is not None:
            raise ValueError("grammar: it and json_schema exclude each other")
        return self

    def tuned(self) -> dict[str, Any]:
        found = super().tuned()
        if self.samplers is not None and not self.mirostat:
            found |= neutral(set(SAMPLERS) - set(self.samplers))
        return found


class PromptObject(Body):
    lacking: ClassVar[dict[str, str]] = {"multimodal_data": "other modalities than text"}

    prompt_string: LongText


class CompletionRequest(Options):
    prompt: LongText | PromptObject | list[Token | LongText | list[Part] | PromptObject] = Field(
        description="a text, or a list of tokens and texts that are one prompt; several: a list of these, or of texts alone"
    )

    @property
    def prompts(self) -> list[str | list[int | str]]:
        """Each prompt as a text, or as parts that are tokens or texts. ValueError if a list mixes tokens and prompts."""
        many = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if any(isinstance(one, int) for one in many):
            if not all(isinstance(one, int | str) for one in many):
                raise ValueError
            return [[one for one in many if isinstance(one, int | str)]]
        return [one.prompt_string if isinstance(one, PromptObject) else one for one in many if not isinstance(one, int)]


class Extra(Body):
    """Another file, or a part of one."""

    filename: str | None = Field(None, max_length=4096)
    text: LongText
    time: Number = Field(None, description="accepted, and without effect")


class InfillRequest(Options):
    input_prefix: LongText | None = None
    input_suffix: LongText | None = None
    input_extra: list[Extra] | None = Field(None, max_length=FILES, description="the first are left out if there is no room for them")
    prompt: LongText | None = Field(None, description="follows input_prefix")


class TemplateRequest(Body):
    model: str | None = Field(None, max_length=400)
    messages: list[Message] = Field(min_length=1, max_length=MESSAGES)
    tools: list[Tool] | None = Field(None, max_length=TOOLS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=VARIABLES, description="variables for the template")
