"""The endpoints of OpenAI's interface, and the two for tokens that other servers have as well."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from redraft.serve import documents, schema
from redraft.serve.chat import converse
from redraft.serve.complete import complete
from redraft.serve.documents import WORKING, answers
from redraft.serve.embed import vectors
from redraft.serve.errors import Refused
from redraft.serve.openai_reply import ChatWriter, CompletionWriter
from redraft.serve.service import Service, service

COMPLETION_TOKENS = 16  # OpenAI's default

router = APIRouter()


@router.post("/v1/completions", **answers(documents.Completion, *WORKING, chunk=documents.CompletionChunk))
async def completions(http: Request, body: schema.CompletionRequest) -> Response:
    """Continues a prompt, or several, or fills what is between a prompt and a suffix."""
    if body.max_tokens == 0 and not body.echo:
        raise Refused(400, "max_tokens = 0: at least 1, or echo", "max_tokens")
    if body.suffix == "":
        body.suffix = None
    return await complete(http, body, CompletionWriter, "cmpl-", max_tokens=COMPLETION_TOKENS)


@router.post("/v1/chat/completions", **answers(documents.ChatCompletion, *WORKING, chunk=documents.ChatChunk))
async def chat(http: Request, body: schema.ChatRequest) -> Response:
    """Replies to a conversation."""
    return await converse(http, body, ChatWriter, "chatcmpl-")


@router.post("/v1/embeddings", **answers(documents.Embeddings, *WORKING))
async def embeddings(http: Request, body: schema.EmbeddingRequest) -> Response:
    """A vector for each text."""
    found, count = await vectors(http, body)
    data = []
    for index, vector in enumerate(found):
        sent: Any = base64.b64encode(vector.astype("<f4").tobytes()).decode() if body.encoding_format == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": sent})
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": body.model or service(http).names[0], "usage": usage})


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
    if [body.prompt, body.messages, body.content].count(None) != 2:
        raise Refused(400, "one of prompt, messages and content is needed", "prompt")
    if body.messages is not None:
        prompt = await here.prompts.conversation(body, deadline)
    elif body.content is not None:
        (prompt,) = await here.prompts.read(body.content, deadline, special=bool(body.add_special), field="content")
    else:
        (prompt,) = await here.prompts.read(body.prompt or "", deadline, special=body.add_special_tokens is not False)
    found: dict[str, Any] = {"count": len(prompt.tokens), "max_model_len": here.llm.max_model_len, "tokens": prompt.tokens}
    if body.return_token_strs:
        found["token_strs"] = [here.llm.tokenizer.bytes_of(token).decode("utf-8", "replace") for token in prompt.tokens]
    if body.with_pieces:
        found["tokens"] = [{"id": token, "piece": _piece(here.llm.tokenizer.bytes_of(token))} for token in prompt.tokens]
    return found


@router.post("/detokenize", **answers(documents.Detokenized, 404, 504))
async def detokenize(http: Request, body: schema.DetokenizeRequest) -> dict[str, Any]:
    """The text of tokens."""
    here = service(http)
    here.known(body.model)
    if not body.tokens:
        return {"prompt": "", "content": ""}
    (prompt,) = await here.prompts.read(body.tokens, here.deadline, texts=True, field="tokens")
    return {"prompt": prompt.text, "content": prompt.text}


def _piece(raw: bytes) -> str | list[int]:
    """The text of a token, or its bytes if these are no text."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def about(here: Service, name: str) -> dict[str, Any]:
    """The description of a model; the parent of an adapter is the model that it changes."""
    base = here.names[0]
    root, parent = (base, None) if name in here.names else (name, base)
    found = {"object": "model", "created": here.began, "owned_by": "redraft", "root": root, "parent": parent}
    return {"id": name, **found, "max_model_len": here.llm.max_model_len, "permission": []}
