"""The forms of the server's answers in its OpenAPI document: every status that an operation sends.

Nothing here runs for a request; schemathesis checks the answers against it.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from redraft.serve.config import ServeConfig
from redraft.serve.errors import ErrorReply
from redraft.serve.limits import ADMIN, OPEN, key_header

STATUSES = {
    400: "the request is wrong: param names the field",
    401: "no valid key",
    403: "a web page or host that this server does not serve, or loading at run time is off",
    404: "no such model or adapter",
    408: "the request did not arrive in time",
    413: "the body is too large",
    429: "too many requests wait: Retry-After says how long to wait",
    431: "the headers are too large",
    500: "the server's fault",
    503: "shutting down, or out of memory for this request",
    504: "it took too long",
}
ALWAYS = (400, 401, 403, 408, 413, 431, 500)  # of any operation; 401 only if keys are set and the operation needs one
WORKING = (404, 429, 503, 504)  # runs in the engine
KEY, ADMIN_KEY = "key", "admin key"
CHUNKS: list[type[BaseModel]] = []  # forms of events, which no operation has as its answer
DONE = "or an ErrorReply, that of the last is [DONE]"


class Form(BaseModel):
    """A part of a reply. No other fields are sent. Fields without a default are always present."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


# ---- parts of texts


class CacheMiss(Form):
    """Token `at` of the prompt differs from the cached text, which would have given `lost` more tokens."""

    at: int
    text: str
    cached_text: str
    lost: int


class CachedTokens(Form):
    cached_tokens: int = Field(description="of the prompt, found in the prefix cache")
    reused_tokens: int | None = Field(None, description="with reuse: taken from the cache of segments")
    repaired_tokens: int | None = Field(None, description="with reuse: those that ran again through all layers")
    repair_rows: float | None = Field(None, description="with reuse: all that ran again, in whole rows")
    cache_miss: CacheMiss | None = Field(None, description="with reuse: where the prompt left the prefix cache")


class PredictionTokens(Form):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Form):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: PredictionTokens | None = None


class RequestMetrics(Form):
    """Times of the request in seconds, and figures of its drafts."""

    time_to_first_token: float | None
    queue_time: float | None
    mean_inter_token_latency: float | None
    steps: int = Field(description="passes that sampled a token")
    drafted: int
    accepted: int
    mean_acceptance_length: float | None
    acceptance_by_position: list[int]
    stopped_drafters: list[str] = Field(description="drafters that stopped for a while, because their drafts did not pay")
    faults: list[str] = Field(description="why a text continued without drafts")
    disk_tokens: int = Field(description="of the prompts, found in the prefix cache on disk")
    disk_seconds: float | None = Field(description="that it took to read them")
    cache_policies: list[str] = Field(description="of each prompt: its eviction, quantization and sparse attention, or none")
    seeds: list[int] = Field(description="of each prompt; repeating the request with it gives the same text")


class Alternative(Form):
    token: str
    token_id: int
    probability: float


class Origin(Alternative):
    """The source of a token."""

    bytes: list[int] | None = Field(None, description="of a token that ends within a character or begins in one; else it is left out")
    step: int
    origin: str = Field(description="the drafter that proposed it, or model")
    rank: int
    alternatives: list[Alternative]


class Node(Form):
    token: str
    token_id: int
    parent: int
    origin: str
    accepted: bool


class Tree(Form):
    step: int
    nodes: list[Node]


class PromptLogprob(Form):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class Piece(Form):
    """Fields that whole texts and pieces of streams have in common."""

    index: int
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    provenance: list[Origin] | None = None
    trees: list[Tree] | None = None


# ---- completions


class CompletionLogprobs(Form):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionPiece(Piece):
    text: str
    logprobs: CompletionLogprobs | None


class CompletionChoice(CompletionPiece):
    prompt_logprobs: PromptLogprobs | None = None


class Frame(Form):
    id: str
    created: int
    model: str
    system_fingerprint: str


class Completion(Frame):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    metrics: RequestMetrics


class CompletionChunk(Frame):
    """The data of an event of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionPiece] = Field(description="none in the chunk of the usage")
    usage: Usage | None = None
    metrics: RequestMetrics | None = None


# ---- chats


class TokenLogprob(Form):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Form):
    content: list[ContentLogprob]
    refusal: None


class Called(Form):
    name: str
    arguments: str = Field(description="JSON, as the model wrote it")


class Call(Form):
    id: str
    type: Literal["function"]
    function: Called


class Reply(Form):
    role: str
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None


class CalledPiece(Form):
    name: str | None = Field(None, description="in the first piece of a call")
    arguments: str


class CallPiece(Form):
    index: int
    id: str | None = Field(None, description="in the first piece of a call, as is the type")
    type: Literal["function"] | None = None
    function: CalledPiece


class Delta(Form):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallPiece] | None = None


class ChatChoice(Piece):
    message: Reply
    logprobs: ChatLogprobs | None


class ChatPiece(Piece):
    delta: Delta
    logprobs: ChatLogprobs | None


class ChatCompletion(Frame):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    metrics: RequestMetrics
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ChatChunk(Frame):
    """The data of an event of a stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPiece] = Field(description="none in the chunk of the usage")
    usage: Usage | None = None
    metrics: RequestMetrics | None = None


# ---- others


class Embedding(Form):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="or little-endian float32 in base64")


class EmbeddingUsage(Form):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Form):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(Form):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None = Field(description="of an adapter, the model that it changes")
    max_model_len: int
    permission: list[str]


class Models(Form):
    object: Literal["list"]
    data: list[Model]


class Unloaded(Form):
    id: str
    object: Literal["model"]
    deleted: Literal[True]


class TokenPiece(Form):
    id: int
    piece: str | list[int] = Field(description="its text, or its bytes if these are no text")


class Tokens(Form):
    count: int
    max_model_len: int
    tokens: list[int] | list[TokenPiece]
    token_strs: list[str] | None = None


class Detokenized(Form):
    prompt: str
    content: str = Field(description="the same")


class Endpoint(Form):
    method: str
    path: str
    about: str


class Index(Form):
    name: Literal["redraft"]
    version: str
    endpoints: list[Endpoint]


class Healthy(Form):
    status: Literal["ok"]


class Ready(Form):
    status: Literal["ready"]


class Version(Form):
    version: str


class Pages(Form):
    pages: int


class CacheInfo(Form):
    pages: int
    tokens_per_page: int
    prefix_sharing: bool
    on_disk: bool = Field(description="prefixes are kept for later processes")


class WorkerInfo(Form):
    name: str
    ready: bool
    starts: int
    running: int
    waiting: int


class PolicyOfLength(Form):
    prompt_tokens: int = Field(description="of prompts with at least so many tokens")
    policy: str = Field(description="seam=name:option=value with + between several, or none: the whole cache")


class ServerInfo(Form):
    version: str
    models: list[str]
    adapters: list[str]
    family: str
    max_model_len: int
    backend: str
    dtype: str
    device: str
    threads: int | None
    quant: str | None
    draft: str
    verify: str
    guarantee: str = Field(description="of requests that choose nothing")
    scheduler: dict[str, Any]
    cache: CacheInfo
    workers: list[WorkerInfo]
    policies: dict[str, str | None]
    cache_policy: list[PolicyOfLength] = Field(description="of requests that choose no cache policy, by the length of the prompt")
    parsers: dict[str, str | None] = Field(description="formats of tool_calls and of reasoning")
    methods: dict[str, list[str]]
    limits: dict[str, float]


# ---- the document


def answers(
    reply: Any,
    *statuses: int,
    text: str = "the answer",
    chunk: type[BaseModel] | None = None,
    last: str = DONE,
    stream: str = "text/event-stream",
    error: type[BaseModel] = ErrorReply,
    html: bool = False,
) -> dict[str, Any]:
    """Arguments of an endpoint's decorator. reply: a Form, or None for plain text; chunk: the form of a stream's events; last: how a
    stream ends; stream: its media type; error: the form of errors; html: browsers get a page."""
    good: dict[str, Any] = {"description": text}
    if reply is None:
        good["content"] = {"text/plain": {"schema": {"type": "string"}}}
    else:
        good["model"] = reply
    if chunk is not None:
        CHUNKS.append(chunk)
        events = "server-sent events; the data of each is" if stream == "text/event-stream" else "lines of JSON; each is"
        good["content"] = {stream: {"schema": {"type": ["string", "object"], "description": f"{events} a {chunk.__name__} {last}"}}}
    if html:
        good["content"] = {"text/html": {"schema": {"type": "string"}}}
    responses: dict[int, dict[str, Any]] = {200: good}
    for status in sorted({*ALWAYS, *statuses}):
        responses[status] = {"model": error, "description": STATUSES[status]}
    return {"response_model": None, "responses": responses}


def describe(app: FastAPI, config: ServeConfig) -> None:
    """Corrects the document: errors have one form, and keys are described where there are any."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _correct(plain(), config)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _correct(document: dict[str, Any], config: ServeConfig) -> None:
    parts = document["components"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which are never sent
        parts["schemas"].pop(name, None)
    for chunk in CHUNKS:
        made = chunk.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
        parts["schemas"] |= made.pop("$defs", {}) | {chunk.__name__: made}
    schemes = ([KEY] if config.api_key else []) + ([ADMIN_KEY] if config.loads else [])
    if schemes:
        parts["securitySchemes"] = {name: {"type": "http", "scheme": "bearer"} for name in schemes}
    for path, operations in document["paths"].items():
        header = key_header(path).decode()
        if header and KEY in schemes:
            parts["securitySchemes"][header] = {"type": "apiKey", "in": "header", "name": header}
        for operation in operations.values():
            operation["responses"].pop("422", None)
            needed = ADMIN_KEY if config.loads and path in ADMIN else KEY
            if needed not in schemes or path in OPEN:
                operation["responses"].pop("401", None)
            else:
                operation["security"] = [{needed: []}, *([{header: []}] if header else [])]
