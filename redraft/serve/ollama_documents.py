"""The forms of answers of Ollama's interface in the OpenAPI document. Durations are in nanoseconds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from redraft.serve.documents import Form


class OllamaError(BaseModel):
    error: str


class Ended(Form):
    """Fields of the last line of a stream, and of a whole reply."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"] | None = None
    total_duration: int | None = None
    load_duration: int | None = Field(None, description="0: the model is loaded")
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = Field(None, description="until the first token")
    eval_count: int | None = None
    eval_duration: int | None = Field(None, description="from the first token to the last")


class OllamaLogprob(Form):
    token: str
    logprob: float
    bytes: list[int]


class OllamaLogprobs(OllamaLogprob):
    top_logprobs: list[OllamaLogprob]


class OllamaText(Ended):
    response: str
    thinking: str | None = None
    logprobs: list[OllamaLogprobs] | None = None


class OllamaFunction(Form):
    index: int
    name: str
    arguments: dict[str, Any]


class OllamaCall(Form):
    id: str
    function: OllamaFunction


class OllamaMessage(Form):
    role: str
    content: str
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None


class OllamaChat(Ended):
    message: OllamaMessage
    logprobs: list[OllamaLogprobs] | None = None


class OllamaEmbeddings(Form):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaDetails(Form):
    parent_model: str = Field(description="of an adapter, the model that it changes")
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(Form):
    name: str
    model: str
    modified_at: str
    size: int = Field(description="bytes of the weights")
    digest: str = Field(description="of the name: files are not read again for it")
    details: OllamaDetails


class OllamaModels(Form):
    models: list[OllamaModel]


class OllamaLoaded(OllamaModel):
    expires_at: str
    size_vram: int
    context_length: int


class OllamaRunning(Form):
    models: list[OllamaLoaded]


class OllamaShown(Form):
    modelfile: str
    parameters: str = Field(description="the checkpoint's own defaults of sampling")
    template: str
    details: OllamaDetails
    model_info: dict[str, int | str | float]
    capabilities: list[str]
    modified_at: str
