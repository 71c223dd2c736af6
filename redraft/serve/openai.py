"""The endpoints of OpenAI's interface, and the two for tokens that other servers have as well."""

from __future__ import annotations

import base64
import secrets
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from redraft.config import SamplingParams
from redraft.core.sequence import Pooling
from redraft.serve import documents, schema
from redraft.serve.documents import WORKING, answers
from redraft.serve.errors import Refused
from redraft.serve.limits import unless_gone
from redraft.serve.reply import ALTERNATIVES, Wanted, Writer
from redraft.serve.service import Service, service, within
from redraft.serve.stream import whole

COMPLETION_TOKENS = 16  # OpenAI's default

router = APIRouter()


@router.post("/v1/completions", **answers(documents.Completion, *WORKING, chunk=documents.CompletionChunk))
async def completions(http: Request, body: schema.CompletionRequest) -> Response:
    """Continues a prompt, or several."""
    here = service(http)
    deadline = here.deadline
    lora = here.chosen(http, body.model)
    _check_stream(body)
    within("logprobs", body.logprobs, here.config.max_logprobs)
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
        lora=lora,
    )
    prompts = await here.prompts.read(body.prompt, deadline, special=body.add_special_tokens is not False, texts=bool(body.echo))
    name = f"cmpl-{secrets.token_hex(12)}"
    wanted = here.wanted(body, params, id=name, chat=False, logprobs=body.logprobs, echo=bool(body.echo), drop=drop)
    return await here.reply(http, body, prompts, params, wanted, deadline)


@router.post("/v1/chat/completions", **answers(documents.ChatCompletion, *WORKING, chunk=documents.ChatChunk))
async def chat(http: Request, body: schema.ChatRequest) -> Response:
    """Replies to a conversation."""
    here = service(http)
    deadline = here.deadline
    lora = here.chosen(http, body.model)
    _check_stream(body)
    within("top_logprobs", body.top_logprobs, here.config.max_logprobs)
    if body.top_logprobs and not body.logprobs:
        raise Refused(400, "top_logprobs needs logprobs", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None and body.max_tokens != body.max_completion_tokens:
        raise Refused(400, "max_tokens and max_completion_tokens differ: give one of them", "max_completion_tokens")
    requested = (body.top_logprobs or 0) if body.logprobs else None
    likeliest = max(requested or 0, ALTERNATIVES + 1) if body.provenance else requested
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params = here.params(body, max_tokens=max_tokens, logprobs=likeliest, provenance=body.provenance, lora=lora)
    prompt = await here.prompts.conversation(body, deadline)
    wanted = here.wanted(body, params, id=f"chatcmpl-{secrets.token_hex(12)}", chat=True, logprobs=requested)
    return await here.reply(http, body, [prompt], params, wanted, deadline)


@router.post("/v1/embeddings", **answers(documents.Embeddings, *WORKING))
async def embeddings(http: Request, body: schema.EmbeddingRequest) -> Response:
    """A vector for each text."""
    here = service(http)
    deadline, lora = here.deadline, here.chosen(http, body.model)
    model = body.model or here.names[0]
    size = here.llm.runner.spec.hidden
    if body.dimensions not in (None, size):
        raise Refused(400, f"dimensions = {body.dimensions}: this model has {size}, and fewer are not supported", "dimensions")
    pool = Pooling(body.pooling or "last")
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, draft="none", draft_rows=0, seed=0, lora=lora)
    prompts = await here.prompts.read(body.input, deadline, field="input")
    submissions, data = [], []
    for at in range(0, len(prompts), here.config.max_queue):  # as many at a time as may wait
        some = await here.submit(prompts[at : at + here.config.max_queue], params, http, body, deadline, pool)
        writer = Writer(Wanted("", model, False), here.llm.tokenizer, some, [""] * len(some))
        await unless_gone(http.receive, whole(writer, deadline), partial(here.shell.forget, *some))
        submissions += some
    for index, submission in enumerate(submissions):
        vector = submission.request.embedding(body.normalize is not False).astype(np.float32)
        sent: Any = base64.b64encode(vector.astype("<f4").tobytes()).decode() if body.encoding_format == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": sent})
    count = sum(len(prompt.tokens) for prompt in prompts)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage})


@router.get("/v1/models", **answers(documents.Models))
async def models(http: Request) -> dict[str, Any]:
    """The names of what is served."""
    here = service(http)
    return {"object": "list", "data": [about(here, name) for name in (*here.names, *here.llm.loras)]}


@router.get("/v1/models/{model:path}", **answers(documents.Model, 404))
async def model(http: Request, model: str) -> dict[str, Any]:
    """One of them."""
    here = service(http)
    return about(here, here.known(model))


@router.post("/tokenize", **answers(documents.Tokens, 404, 504))
async def tokenize(http: Request, body: schema.TokenizeRequest) -> dict[str, Any]:
    """The tokens of a text or a conversation."""
    here = service(http)
    deadline = here.deadline
    here.known(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise Refused(400, "either prompt or messages is needed", "prompt")
    if body.messages is not None:
        prompt = await here.prompts.conversation(body, deadline)
    else:
        (prompt,) = await here.prompts.read(body.prompt or "", deadline, special=body.add_special_tokens is not False)
    found: dict[str, Any] = {"count": len(prompt.tokens), "max_model_len": here.llm.max_model_len, "tokens": prompt.tokens}
    if body.return_token_strs:
        found["token_strs"] = [here.llm.tokenizer.bytes_of(token).decode("utf-8", "replace") for token in prompt.tokens]
    return found


@router.post("/detokenize", **answers(documents.Detokenized, 404, 504))
async def detokenize(http: Request, body: schema.DetokenizeRequest) -> dict[str, Any]:
    """The text of tokens."""
    here = service(http)
    here.known(body.model)
    if not body.tokens:
        return {"prompt": ""}
    (prompt,) = await here.prompts.read(body.tokens, here.deadline, texts=True, field="tokens")
    return {"prompt": prompt.text}


def _check_stream(body: schema.Sampled) -> None:
    if body.stream and body.prompt_logprobs is not None:
        raise Refused(400, "prompt_logprobs is not supported with stream", "prompt_logprobs")
    if body.stream_options is not None and body.stream_options.include_usage and not body.stream:
        raise Refused(400, "stream_options needs stream", "stream_options")


def about(here: Service, name: str) -> dict[str, Any]:
    """The description of a model; the parent of an adapter is the model that it changes."""
    base = here.names[0]
    root, parent = (base, None) if name in here.names else (name, base)
    found = {"object": "model", "created": here.began, "owned_by": "redraft", "root": root, "parent": parent}
    return {"id": name, **found, "max_model_len": here.llm.max_model_len, "permission": []}
