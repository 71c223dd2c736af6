"""The endpoints: what OpenAI's clients ask, and what those who run a server ask."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import inspect
import itertools
import secrets
import time
import typing
from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any, cast

import numpy as np
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from redraft import __version__, registry
from redraft.config import SamplingParams
from redraft.core import sequence
from redraft.core.noise import Stream
from redraft.core.sequence import Pooling
from redraft.errors import PromptTooLong, RedraftError
from redraft.llm import LLM
from redraft.serve import documents, schema
from redraft.serve.config import ServeConfig
from redraft.serve.documents import WORKING, told
from redraft.serve.errors import Refused, clean
from redraft.serve.limits import Limits, answer, unless_gone
from redraft.serve.metrics import Metrics
from redraft.serve.reply import ALTERNATIVES, Wanted, Writer
from redraft.serve.shell import Shell, Ticket
from redraft.serve.stream import EventStream, lines, whole

PREDICTED = "aggressive"  # the drafter of a request's prediction
LARGEST = 64  # of a number in a drafter's options, where a request chooses it: tables grow with it
PLAIN = {int, float, bool, type(None)}  # types of options that a request may give
SPELLED = ("parts", "draft", "branching")  # and options of text that name methods and shapes, never files
INPUTS = 2048  # texts of one request for embeddings
SLACK = 2  # a tokenizer may make letters fewer before it reads them
COMPLETION_TOKENS = 16  # OpenAI's default
FIELDS = {
    "draft": "speculation.method",
    "verify": "speculation.verifier",
    "keep": "cache.keep",
    "codec": "cache.codec",
    "read": "cache.read",
}
SALTED = 16  # letters of a key's hash
SAME_NAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens",
    "ignore_eos", "stop_token_ids", "bad_words", "include_stop_str_in_output", "skip_special_tokens", "prompt_logprobs", "stop",
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """text: as it was given, or what was made of messages."""

    tokens: list[int]
    text: str


class Service:
    """A loaded model and what its server allows."""

    def __init__(self, llm: LLM, config: ServeConfig) -> None:
        self.llm, self.config = llm, config
        name = llm.name.rstrip("/").rsplit("/", 1)[-1] if llm.name.startswith(("/", ".", "~")) else llm.name
        self.names = config.served_model_name or (name,)
        self.metrics = Metrics(config.metrics_prefix, self.names[0])
        self.shell = Shell(llm.engine, self.metrics, max_queue=config.max_queue)
        self.metrics.watch(llm.engine)
        self.began = int(time.time())
        self._numbers = itertools.count()
        self._longest = max(len(llm.tokenizer.bytes_of(token)) for token in range(llm.runner.spec.vocab))
        self._reader = ThreadPoolExecutor(1, "redraft-tokenizer")  # long texts take a while; one thread, as tokenizers want it
        self._arguments = frozenset(inspect.signature(llm.tokenizer.hf.apply_chat_template).parameters) | {"messages", "template"}

    # ---- requests

    def known(self, model: str | None) -> str:
        if model is None or model in self.names:
            return model or self.names[0]
        raise Refused(404, f"no model {model!r} here; there is {', '.join(self.names)}", "model", "model_not_found")

    def params(self, body: schema.Sampled, **more: Any) -> SamplingParams:
        """Those of the request over the checkpoint's own. Refused or RedraftError names a field."""
        config, given = self.config, {name: value for name in SAME_NAME if (value := getattr(body, name)) is not None}
        self._within("n", body.n, config.max_n)
        self._within("prompt_logprobs", body.prompt_logprobs, config.max_logprobs)
        if isinstance(body.stop, list) and len(body.stop) > config.max_stop:
            raise Refused(400, f"stop has {len(body.stop)} strings: {config.max_stop} are allowed", "stop")
        if body.seed is not None:
            given["seed"] = body.seed % (1 << 64)
        if body.logit_bias is not None:
            given["logit_bias"] = {int(token): amount for token, amount in body.logit_bias.items()}
        for seam in ("keep", "codec", "read", "depth"):
            own, chosen = getattr(config, seam), getattr(body.cache, seam, None)
            if chosen is not None:
                self._safe(seam, chosen, own)
            if chosen or own:
                given[seam] = chosen or own
        return self.llm.params(SamplingParams(**given | self._speculation(body) | {k: v for k, v in more.items() if v is not None}))

    def _speculation(self, body: schema.Sampled) -> dict[str, Any]:
        """Drafter and verifier. A prediction is drafted from, beside what else is chosen."""
        engine, chosen = self.llm.config, body.speculation
        if chosen == "off":
            return {"draft": "none", "draft_rows": 0}
        choice = chosen if isinstance(chosen, schema.SpeculationChoice) else schema.SpeculationChoice()
        given: dict[str, Any] = {}
        if choice.method is not None:
            given["draft"] = self._safe("draft", choice.method, engine.draft)
        if choice.verifier is not None:
            given["verify"] = self._safe("verify", choice.verifier, engine.verify)
        if choice.budget is not None:
            given["draft_rows"] = choice.budget
        if body.prediction is not None:
            given["prediction"] = body.prediction.text
            given["draft"] = self._predicting(given.get("draft", engine.draft), given.get("verify", engine.verify))
        return given

    @staticmethod
    def _predicting(draft: str, verify: str) -> str:
        name = registry.parse(draft)[0]
        verifier: Any = registry.method("verify", registry.parse(verify)[0])
        if name == PREDICTED:
            return draft
        return PREDICTED if name == "none" or verifier.drafts is not Stream.TARGET else f"union:parts=({PREDICTED})+({draft})"

    def _safe(self, seam: str, text: str, own: str | None) -> str:
        """A method that a request may choose: one that opens no file and takes no more memory than others."""
        if text in (own, "none"):
            return text
        try:
            name, given = registry.parse(text)
            for option, value in given.items():
                if _may_name_a_file(seam, name, option):
                    raise Refused(400, f"{name}: a request cannot choose {option!r}: it may name a file", FIELDS[seam])
                if seam == "draft" and _number(value) > LARGEST:
                    raise Refused(400, f"{name}:{option}={value}: at most {LARGEST} is allowed in a request", FIELDS[seam])
                if option in ("parts", "draft"):
                    for part in registry.split(value, "+"):
                        self._safe(seam, part, own)
            registry.create(seam, text)
        except RedraftError as error:
            raise Refused(400, str(error), FIELDS[seam]) from None
        return text

    @staticmethod
    def _within(name: str, value: int | None, most: int) -> None:
        if value is not None and value > most:
            raise Refused(400, f"{name} = {value}: at most {most} is allowed", name)

    # ---- prompts

    async def read(self, task: Any) -> Any:
        """Done by the tokenizer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, task)

    async def prompts(
        self, given: str | Seq[str] | Seq[int] | Seq[Seq[int]], *, special: bool = True, texts: bool = False, field: str = "prompt"
    ) -> list[Prompt]:
        """One text or list of tokens, or several, of this field; texts: their texts are wanted where they are tokens."""
        if isinstance(given, str):
            many: list[Any] = [given]
        elif given and isinstance(given[0], int):
            many = [given]
        else:
            many = list(given)
        if not many:
            raise Refused(400, "no prompt was given", field)
        most = INPUTS if field == "input" else self.config.max_queue
        if len(many) > most:
            raise Refused(400, f"{len(many)} prompts: at most {most} are allowed", field)
        return [await self.read(partial(self._prompt, one, special, texts, field)) for one in many]

    def _prompt(self, one: str | list[int], special: bool, texts: bool, field: str) -> Prompt:
        tokenizer = self.llm.tokenizer
        if isinstance(one, str):
            return Prompt(tokenizer.encode(self._fitting(one, field), special=special), one)
        size = self.llm.runner.spec.vocab
        if outside := next((token for token in one if token >= size), None):
            raise Refused(400, f"token {outside}: not in 0..{size - 1}", field)
        return Prompt(list(one), tokenizer.decode_all(list(one)) if texts else "")

    def _fitting(self, text: str, field: str) -> str:
        """Refuses what cannot fit before it is read: to read megabytes takes seconds, for which others would wait."""
        most = SLACK * self.llm.max_model_len * self._longest
        if len(text) > most:
            message = f"the text has {len(text)} letters: max_model_len = {self.llm.max_model_len} tokens cannot hold them"
            raise Refused(400, message, field, "context_length_exceeded")
        return text

    async def conversation(self, body: schema.ChatRequest | schema.TokenizeRequest) -> Prompt:
        assert body.messages is not None
        variables = dict(body.chat_template_kwargs or {})
        if taken := next((name for name in variables if name in self._arguments or not name.isidentifier()), None):
            raise Refused(400, f"chat_template_kwargs: {taken!r} is no variable that a request can set", "chat_template_kwargs")
        going_on = bool(body.continue_final_message)
        prompting = not going_on if body.add_generation_prompt is None else body.add_generation_prompt
        if going_on and prompting:
            raise Refused(400, "add_generation_prompt and continue_final_message exclude each other", "continue_final_message")
        messages = [message.plain() for message in body.messages]
        options = {"add_generation_prompt": prompting, "template": self.config.chat_template, **variables}
        if going_on:
            options["continue_final_message"] = True
        return cast(Prompt, await self.read(partial(self._render, messages, options)))

    def _render(self, messages: list[dict[str, str]], options: dict[str, Any]) -> Prompt:
        text = self.llm.tokenizer.render(messages, **options)
        return Prompt(self.llm.tokenizer.encode(self._fitting(text, "messages"), special=False), text)

    # ---- answers

    async def submit(
        self, prompts: list[Prompt], params: SamplingParams, key: str, body: Any, pool: Pooling = Pooling.NONE
    ) -> list[Ticket]:
        """All of them are queued, or none."""
        if isinstance(params.prediction, str):
            ids = await self.read(partial(self.llm.tokenizer.encode, self._fitting(params.prediction, "prediction"), special=False))
            params = params.but(prediction=tuple(ids))
        salt = hashlib.sha256(key.encode()).hexdigest()[:SALTED] if key else ""
        salt += f"/{body.cache_salt}" if body.cache_salt else ""
        requests = []
        for prompt in prompts:
            name = f"{next(self._numbers)}-{secrets.token_hex(4)}"
            requests.append(sequence.Request(name, prompt.tokens, params, salt, priority=body.priority or 0, pool=pool))
        try:
            return await self.shell.submit(*requests)
        except PromptTooLong as error:
            field = "input" if pool else "messages" if isinstance(body, schema.ChatRequest) else "prompt"
            raise Refused(400, str(error), field, "context_length_exceeded") from None

    @property
    def deadline(self) -> float:
        return monotonic() + (self.config.request_timeout or float("inf"))

    async def reply(self, http: Request, body: schema.Sampled, prompts: list[Prompt], params: SamplingParams, wanted: Wanted) -> Response:
        deadline, stream = self.deadline, bool(body.stream)
        if stream and wanted.prompt_logprobs is not None:
            raise Refused(400, "prompt_logprobs is not offered with stream", "prompt_logprobs")
        if body.stream_options is not None and not stream:
            raise Refused(400, "stream_options needs stream", "stream_options")
        tickets = await self.submit(prompts, params, http.scope["redraft.key"], body)
        writer = Writer(wanted, self.llm.tokenizer, tickets, [prompt.text for prompt in prompts])
        headers = {"X-Request-Id": wanted.id}
        if stream:
            return EventStream(self.shell, tickets, lines(writer, deadline, self.config.keep_alive), headers)
        forget = partial(self.shell.forget, *tickets)
        return JSONResponse(await unless_gone(http.receive, whole(writer, deadline), forget), headers=headers)

    def wanted(self, body: schema.Sampled, params: SamplingParams, **more: Any) -> Wanted:
        return Wanted(
            model=self.known(body.model),
            role=self.config.response_role,
            prompt_logprobs=body.prompt_logprobs,
            token_ids=bool(body.return_token_ids),
            provenance=params.provenance,
            usage=bool(body.stream_options and body.stream_options.include_usage),
            predicted=PREDICTED if body.prediction is not None else "",
            **more,
        )


router = APIRouter()


def service(http: Request) -> Service:
    return cast(Service, http.app.state.service)


@router.post("/v1/completions", **told(documents.Completion, *WORKING, chunk=documents.CompletionChunk))
async def completions(http: Request, body: schema.CompletionRequest) -> Response:
    here = service(http)
    here.known(body.model)
    here._within("logprobs", body.logprobs, here.config.max_logprobs)
    drop = body.max_tokens == 0
    if drop and not body.echo:
        raise Refused(400, "max_tokens = 0: at least 1, or echo", "max_tokens")
    likeliest = body.logprobs
    if body.provenance:
        likeliest = max(likeliest or 0, ALTERNATIVES + 1)
    params = here.params(
        body,
        max_tokens=COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens or 1,
        min_tokens=0 if drop else None,
        logprobs=likeliest,
        prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0) if body.echo and body.logprobs is not None else None,
        provenance=body.provenance,
    )
    prompts = await here.prompts(body.prompt, special=body.add_special_tokens is not False, texts=bool(body.echo))
    name = f"cmpl-{secrets.token_hex(12)}"
    wanted = here.wanted(body, params, id=name, chat=False, logprobs=body.logprobs, echo=bool(body.echo), drop=drop)
    return await here.reply(http, body, prompts, params, wanted)


@router.post("/v1/chat/completions", **told(documents.ChatCompletion, *WORKING, chunk=documents.ChatChunk))
async def chat(http: Request, body: schema.ChatRequest) -> Response:
    here = service(http)
    here.known(body.model)
    here._within("top_logprobs", body.top_logprobs, here.config.max_logprobs)
    if body.top_logprobs is not None and not body.logprobs:
        raise Refused(400, "top_logprobs needs logprobs", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None and body.max_tokens != body.max_completion_tokens:
        raise Refused(400, "max_tokens and max_completion_tokens differ: give one of them", "max_completion_tokens")
    asked = (body.top_logprobs or 0) if body.logprobs else None
    likeliest = max(asked or 0, ALTERNATIVES + 1) if body.provenance else asked
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params = here.params(body, max_tokens=most, logprobs=likeliest, provenance=body.provenance)
    prompt = await here.conversation(body)
    wanted = here.wanted(body, params, id=f"chatcmpl-{secrets.token_hex(12)}", chat=True, logprobs=asked)
    return await here.reply(http, body, [prompt], params, wanted)


@router.post("/v1/embeddings", **told(documents.Embeddings, *WORKING))
async def embeddings(http: Request, body: schema.EmbeddingRequest) -> Response:
    here = service(http)
    model = here.known(body.model)
    size = here.llm.runner.spec.hidden
    if body.dimensions not in (None, size):
        raise Refused(400, f"dimensions = {body.dimensions}: this model has {size}, no fewer are offered", "dimensions")
    pool = Pooling(body.pooling or "last")
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, draft="none", draft_rows=0, seed=0)
    prompts = await here.prompts(body.input, field="input")
    deadline, tickets, data = here.deadline, [], []
    for at in range(0, len(prompts), here.config.max_queue):  # as many at a time as may wait
        some = await here.submit(prompts[at : at + here.config.max_queue], params, http.scope["redraft.key"], body, pool)
        writer = Writer(Wanted("", model, False), here.llm.tokenizer, some, [""] * len(some))
        await unless_gone(http.receive, whole(writer, deadline), partial(here.shell.forget, *some))
        tickets += some
    for index, ticket in enumerate(tickets):
        vector = ticket.request.embedding(body.normalize is not False).astype(np.float32)
        told: Any = base64.b64encode(vector.astype("<f4").tobytes()).decode() if body.encoding_format == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": told})
    count = sum(len(prompt.tokens) for prompt in prompts)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage})


@router.get("/v1/models", **told(documents.Models))
async def models(http: Request) -> dict[str, Any]:
    here = service(http)
    return {"object": "list", "data": [_model(here, name) for name in here.names]}


@router.get("/v1/models/{model:path}", **told(documents.Model, 404))
async def model(http: Request, model: str) -> dict[str, Any]:
    here = service(http)
    return _model(here, here.known(model))


def _model(here: Service, name: str) -> dict[str, Any]:
    about = {"object": "model", "created": here.began, "owned_by": "redraft", "root": here.names[0], "parent": None}
    return {"id": name, **about, "max_model_len": here.llm.max_model_len, "permission": []}


@router.post("/tokenize", **told(documents.Tokens, 404))
async def tokenize(http: Request, body: schema.TokenizeRequest) -> dict[str, Any]:
    here = service(http)
    here.known(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise Refused(400, "either prompt or messages is needed", "prompt")
    if body.messages is not None:
        prompt = await here.conversation(body)
    else:
        (prompt,) = await here.prompts(body.prompt or "", special=body.add_special_tokens is not False)
    found: dict[str, Any] = {"count": len(prompt.tokens), "max_model_len": here.llm.max_model_len, "tokens": prompt.tokens}
    if body.return_token_strs:
        found["token_strs"] = [here.llm.tokenizer.bytes_of(token).decode("utf-8", "replace") for token in prompt.tokens]
    return found


@router.post("/detokenize", **told(documents.Detokenized, 404))
async def detokenize(http: Request, body: schema.DetokenizeRequest) -> dict[str, Any]:
    here = service(http)
    here.known(body.model)
    if not body.tokens:
        return {"prompt": ""}
    (prompt,) = await here.prompts(body.tokens, texts=True, field="tokens")
    return {"prompt": prompt.text}


@router.get("/health", **told(documents.Healthy, 503))
async def health(http: Request) -> dict[str, str]:
    """Whether the process can answer at all."""
    if not service(http).shell.alive:
        raise Refused(503, "the engine stopped")
    return {"status": "ok"}


@router.get("/ready", **told(documents.Ready, 503))
async def ready(http: Request) -> dict[str, str]:
    """Whether new requests are taken."""
    shell = service(http).shell
    if shell.draining or not shell.alive:
        raise Refused(503, "no new requests are taken")
    return {"status": "ready"}


@router.get("/version", **told(documents.Version))
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/metrics", response_class=Response, **told(None))
async def metrics(http: Request) -> Response:
    return Response(service(http).metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/server_info", **told(documents.ServerInfo))
async def server_info(http: Request) -> dict[str, Any]:
    """What is served, and what a request may choose."""
    here = service(http)
    llm, config = here.llm, here.llm.config
    spec, backend = llm.runner.spec, llm.runner.backend
    return {
        "version": __version__,
        "models": list(here.names),
        "family": spec.family,
        "max_model_len": llm.max_model_len,
        "backend": backend.name,
        "dtype": str(backend.dtype).removeprefix("torch."),
        "device": str(backend.device),
        "threads": backend.threads,
        "quant": config.model.quant,
        "draft": _without_files("draft", config.draft),
        "verify": config.verify,
        "guarantee": llm.guarantee.label,
        "scheduler": config.schedule.model_dump(),
        "cache": {
            "pages": llm.engine.memory.slabs,
            "tokens_per_page": llm.engine.memory.paged.table.page,
            "prefix_sharing": config.cache.prefix_sharing,
        },
        "policies": {seam: getattr(here.config, seam) for seam in ("keep", "codec", "read", "depth")},
        "methods": {
            seam: sorted(names) for seam, names in registry.METHODS.items() if seam in ("draft", "verify", "keep", "codec", "read")
        },
        "limits": here.config.model_dump(include={"max_queue", "request_timeout", "max_body", "max_n", "max_logprobs", "max_stop"}),
    }


@router.post("/reset_prefix_cache", **told(documents.Pages, 503))
async def reset_prefix_cache(http: Request) -> dict[str, int]:
    """Forgets cached prefixes that no text under way uses."""
    here = service(http)
    return {"pages": await here.shell.call(here.llm.engine.memory.paged.table.forget)}


def app(llm: LLM, config: ServeConfig) -> FastAPI:
    """The ASGI application over a loaded model."""
    here = Service(llm, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        here.shell.start()
        yield
        await here.shell.stop()

    made = FastAPI(title="Redraft", version=__version__, lifespan=lifespan, openapi_url="/openapi.json", docs_url=None, redoc_url=None)
    made.state.service = here
    made.include_router(router)
    documents.describe(made, config)

    @made.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return cast(Response, answer(Refused(400, *_wrong(error.errors(), error.body))))

    @made.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        status = error.status_code if error.status_code in (404, 405) else 400
        return cast(Response, answer(Refused(status, str(error.detail), headers=dict(error.headers or {}))))

    @made.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        raise error  # Limits answers it

    made.add_middleware(Limits, config=config)
    if config.allow_origins:
        made.add_middleware(CORSMiddleware, allow_origins=list(config.allow_origins), allow_methods=["*"], allow_headers=["*"])
    return made


def _wrong(errors: Seq[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:
    """Message and field of the first thing that is wrong with a body; where it could be one of several forms, of the nearest."""
    first = max((one for one in errors if one["loc"][:2] == errors[0]["loc"][:2]), key=lambda one: len(one["loc"]))
    parts = []
    for part in first["loc"][1:]:  # among them are names of types
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            parts.append(str(part))
            body = body[part]
    if first["type"] == "missing":
        parts.append(str(first["loc"][-1]))
    place = ".".join(parts)
    kind, text = first["type"], str(first["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"unknown field {place!r}", place
    if kind == "json_invalid":
        return f"the body is no JSON: {first.get('ctx', {}).get('error', text)}", None
    if kind == "value_error" and not place:
        return text, text.partition(":")[0] or None
    given = clean(repr(first.get("input")))[:80]
    return f"{place or 'body'} = {given}: {text[:1].lower()}{text[1:]}", place or None


def _may_name_a_file(seam: str, name: str, option: str) -> bool:
    hint = typing.get_type_hints(registry.method(seam, name)).get(option, int)
    return not {*(typing.get_args(hint) or (hint,))} <= PLAIN and option not in SPELLED


def _without_files(seam: str, text: str) -> str:
    """A method as clients may see it: its name alone where an option of it, or of its parts, is a place on this machine."""
    name, given = registry.parse(text)
    parts = [part for option in ("parts", "draft") if option in given for part in registry.split(given[option], "+")]
    hides = any(_may_name_a_file(seam, name, option) for option in given) or any(_without_files(seam, part) != part for part in parts)
    return name if hides else text


def _number(text: str) -> float:
    """What an option's value comes to, 0 where it is no number."""
    try:
        return float(text)
    except ValueError:
        return 0.0
