"""The endpoints of Ollama's interface. It serves the models that were loaded at the start, and changes none."""

from __future__ import annotations

import hashlib
import math
import re
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from redraft import __version__
from redraft.config import closed
from redraft.errors import Unsupported
from redraft.serve import errors, schema
from redraft.serve import ollama_documents as documents
from redraft.serve.chat import converse
from redraft.serve.choices import public
from redraft.serve.complete import complete
from redraft.serve.documents import WORKING, Version, answers
from redraft.serve.embed import vectors
from redraft.serve.errors import Refused, clean, renaming
from redraft.serve.invalid import made
from redraft.serve.ollama_reply import MEDIA_TYPE, ChatWriter, TextWriter, line, moment
from redraft.serve.ollama_schema import ChatRequest, EmbedRequest, GenerateRequest, Options, ShowRequest, TextRequest
from redraft.serve.service import Service, service

LATEST = ":latest"
NEVER = "9999-12-31T23:59:59Z"  # when a loaded model is unloaded
SWITCHES = ("enable_thinking", "thinking")  # variables by which templates switch reasoning on or off
NAMES = {  # of the fields of completions and chats here
    "max_completion_tokens": "num_predict", "max_tokens": "num_predict", "repetition_penalty": "repeat_penalty",
    "structured_outputs.json": "format", "structured_outputs": "format",
}  # fmt: skip
LACKING = {
    ("POST", "pull"): "loads no models", ("POST", "push"): "stores no models elsewhere", ("POST", "create"): "makes no models",
    ("POST", "copy"): "has no further names for models", ("DELETE", "delete"): "deletes no models",
    ("POST", "embeddings"): "has /api/embed in its place",
}  # fmt: skip

errors.FORMS["/api/"] = lambda error: {"error": clean(error.message)}
router = APIRouter(prefix="/api")
form: dict[str, Any] = {"error": documents.OllamaError}
streamed: dict[str, Any] = {**form, "stream": MEDIA_TYPE, "last": "or an OllamaError, done in the last"}


@router.post("/generate", **answers(documents.OllamaText, *WORKING, chunk=documents.OllamaText, **streamed))
async def generate(http: Request, body: GenerateRequest) -> Response:
    """Answers or continues a prompt, or fills what is between it and a suffix."""
    here, text = service(http), body.prompt or ""
    common = _common(here, body) | {"max_tokens": _new_tokens(body.options)}
    write = partial(TextWriter, body.model)
    if not text and not body.suffix:
        return _loaded(here, body, {"response": ""})
    if body.raw or body.suffix or not (here.config.chat_template or here.llm.tokenizer.has_template):
        if body.system:
            raise Refused(400, "system: a prompt that is continued as it is has none", "system")
        if body.think:
            raise Refused(400, f"think = {body.think!r}: a prompt that is continued as it is is not answered", "think")
        own = {"prompt": text, "suffix": body.suffix or None, "logprobs": (body.top_logprobs or 0) if body.logprobs else None}
        return await renaming(complete(http, made(schema.CompletionRequest, common | own), write, "ollama-"), NAMES)
    messages = [{"role": "system", "content": body.system}] if body.system else []
    return await _reply(http, here, body, common | {"messages": [*messages, {"role": "user", "content": text}]}, write)


@router.post("/chat", **answers(documents.OllamaChat, *WORKING, chunk=documents.OllamaChat, **streamed))
async def chat(http: Request, body: ChatRequest) -> Response:
    """Replies to a conversation. If its last message is the assistant's, the reply continues it."""
    here = service(http)
    common = _common(here, body) | {"max_tokens": _new_tokens(body.options)}
    if not body.messages:
        return _loaded(here, body, {"message": {"role": here.config.response_role, "content": ""}})
    last = body.messages[-1]
    own = {
        "messages": [message.plain() for message in body.messages],
        "continue_final_message": True if last.role == "assistant" and last.content and not last.tool_calls else None,
        "tools": [tool.plain() for tool in body.tools or ()] or None,
    }
    return await _reply(http, here, body, common | own, partial(ChatWriter, body.model))


@router.post("/embed", **answers(documents.OllamaEmbeddings, *WORKING, **form))
async def embed(http: Request, body: EmbedRequest) -> Response:
    """A vector for each text."""
    here, began = service(http), monotonic()
    _checked(here, body.options)
    own = {"model": _served(here, body.model), "input": body.input, "dimensions": body.dimensions}
    found, count = await vectors(http, made(schema.EmbeddingRequest, own))
    took = {"total_duration": round((monotonic() - began) * 1e9), "load_duration": 0, "prompt_eval_count": count}
    return JSONResponse({"model": body.model, "embeddings": [vector.tolist() for vector in found], **took})


@router.get("/tags", **answers(documents.OllamaModels, **form))
async def tags(http: Request) -> dict[str, Any]:
    """The models that are served."""
    here = service(http)
    return {"models": [_about(here, name) for name in (*here.names, *here.llm.loras)]}


@router.get("/ps", **answers(documents.OllamaRunning, **form))
async def ps(http: Request) -> dict[str, Any]:
    """The models that are loaded: all of them, and for good."""
    here = service(http)
    onto = here.llm.weight_bytes if str(here.llm.backend.device).startswith("cuda") else 0
    more = {"expires_at": NEVER, "size_vram": onto, "context_length": here.llm.max_model_len}
    return {"models": [_about(here, name) | more for name in (*here.names, *here.llm.loras)]}


@router.post("/show", **answers(documents.OllamaShown, 404, **form))
async def show(http: Request, body: ShowRequest) -> dict[str, Any]:
    """What a model is and can do."""
    here = service(http)
    name = here.known(_served(here, body.model))
    spec, template = here.llm.spec, _template(here)
    capabilities = ["completion", "embedding"] + (["tools"] if template else []) + (["thinking"] if _switches(template) else [])
    with suppress(Unsupported):
        capabilities += ["insert"] if here.llm.fill else []
    family = spec.family
    return {
        "modelfile": f"FROM {name}\n",
        "parameters": "\n".join(f"{key} {value}" for key, value in sorted(here.llm.defaults.items())),
        "template": template,
        "details": _details(here, name),
        "model_info": {
            "general.architecture": family,
            "general.parameter_count": _count(here),
            f"{family}.block_count": len(spec.layers),
            f"{family}.context_length": here.llm.max_model_len,
            f"{family}.embedding_length": spec.hidden,
            f"{family}.vocab_size": spec.vocab,
        },
        "capabilities": capabilities,
        "modified_at": moment(here.began),
    }


@router.get("/version", **answers(Version, **form))
async def version() -> dict[str, str]:
    """The version of Redraft."""
    return {"version": __version__}


def _refuse(name: str, why: str) -> Any:
    async def refuse() -> None:
        raise Refused(400, f"{name}: this server {why}")

    refuse.__doc__ = f"Refused: this server {why}."
    refuse.__name__ = name
    return refuse


for (method, name), why in LACKING.items():
    router.add_api_route(f"/{name}", _refuse(name, why), methods=[method], **answers(documents.OllamaError, text="never", **form))


# ---- requests


async def _reply(http: Request, here: Service, body: TextRequest, values: dict[str, Any], write: Any) -> Response:
    own = {"logprobs": body.logprobs, "top_logprobs": body.top_logprobs, "chat_template_kwargs": _variables(here, body)}
    return await renaming(converse(http, made(schema.ChatRequest, values | own), write, "ollama-"), NAMES)


def _common(here: Service, body: TextRequest) -> dict[str, Any]:
    """Fields of a completion and of a chat."""
    if body.top_logprobs and not body.logprobs:
        raise Refused(400, "top_logprobs needs logprobs", "top_logprobs")
    options = _checked(here, body.options)
    wanted = {"json_object": True} if body.format == "json" else {"json": closed(body.format)} if isinstance(body.format, dict) else None
    return options.tuned() | {"model": _served(here, body.model), "stream": body.stream is not False, "structured_outputs": wanted}


def _checked(here: Service, options: Options | None) -> Options:
    options = options or Options()
    if (options.num_ctx or 0) > here.llm.max_model_len:
        raise Refused(
            400, f"num_ctx = {options.num_ctx}: the context of this server has {here.llm.max_model_len} tokens", "options.num_ctx"
        )
    return options


def _new_tokens(options: Options | None) -> int | None:
    number = None if options is None else options.num_predict
    return number if number is not None and number > 0 else None


def _served(here: Service, name: str) -> str:
    """The server's name of a model that clients may call NAME or NAME:latest."""
    known = {*here.names, *here.llm.adapters}
    return next((one for one in (name, name.removesuffix(LATEST), name + LATEST) if one in known), name)


def _variables(here: Service, body: TextRequest) -> dict[str, Any] | None:
    """Variables of the chat template for `think`. Refused (400) if it does not know them."""
    if body.think is None:
        return None
    template = _template(here)
    if isinstance(body.think, str):
        if "reasoning_effort" not in template:
            raise Refused(400, f"think = {body.think!r}: the chat template does not know an effort of reasoning", "think")
        return {"reasoning_effort": body.think}
    reasons, switches = "think" in template or "reasoning_effort" in template, _switches(template)
    if reasons and not switches and not body.think:
        raise Refused(400, "think = false: the chat template cannot switch reasoning off", "think")
    if body.think and not reasons:
        raise Refused(400, "think = true: the chat template does not know reasoning", "think")
    return dict.fromkeys(switches, body.think) or None


def _switches(template: str) -> list[str]:
    return [name for name in SWITCHES if re.search(rf"(?<![\w.'\"]){name}\b(?!['\"])", template)]


def _template(here: Service) -> str:
    tokenizer = here.llm.tokenizer
    return tokenizer.template(here.config.chat_template) if here.config.chat_template or tokenizer.has_template else ""


def _loaded(here: Service, body: TextRequest, empty: dict[str, Any]) -> Response:
    """The reply to a request without a prompt, by which clients load a model."""
    here.known(_served(here, body.model))
    reply = {"model": body.model, "created_at": moment(), **empty, "done": True, "done_reason": "load"}
    return Response(line(reply), media_type="application/json" if body.stream is False else MEDIA_TYPE)


# ---- models


def _about(here: Service, name: str) -> dict[str, Any]:
    shown = name if ":" in name else name + LATEST
    digest = hashlib.sha256(name.encode()).hexdigest()
    about = {"size": here.llm.weight_bytes, "digest": digest, "details": _details(here, name)}
    return {"name": shown, "model": shown, "modified_at": moment(here.began), **about}


def _details(here: Service, name: str) -> dict[str, Any]:
    llm, quant, count = here.llm, here.llm.config.model.quant, _count(here)
    unit, letter = next((one for one in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if count >= one[0]), (1, ""))
    return {
        "parent_model": "" if name in here.names else here.names[0],
        "format": "gguf" if llm.source.is_file() else "safetensors",
        "family": llm.spec.family,
        "families": [llm.spec.family],
        "parameter_size": f"{count / unit:.1f}{letter}",
        "quantization_level": public("quant", quant) if quant else str(llm.backend.dtype).removeprefix("torch."),
    }


def _count(here: Service) -> int:
    """The number of parameters."""
    return sum(math.prod(shape) for shape in here.llm.spec.shapes().values())
