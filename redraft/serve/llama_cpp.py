"""The endpoints of llama.cpp's server that are not OpenAI's. /tokenize and /detokenize take both forms."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from redraft import __version__
from redraft.config import closed
from redraft.serve import errors, schema
from redraft.serve import llama_cpp_documents as documents
from redraft.serve.complete import complete
from redraft.serve.documents import WORKING, answers
from redraft.serve.errors import Refused, renaming
from redraft.serve.invalid import made
from redraft.serve.llama_cpp_reply import Asked, LlamaWriter, error_body, settings
from redraft.serve.llama_cpp_schema import CompletionRequest, InfillRequest, Options, TemplateRequest
from redraft.serve.service import Service, service

NAMES = {  # of the fields of completions here
    "max_tokens": "n_predict", "logprobs": "n_probs", "n": "n_cmpl", "repetition_penalty": "repeat_penalty",
    "structured_outputs.json": "json_schema", "structured_outputs.grammar": "grammar", "structured_outputs": "grammar",
}  # fmt: skip
FILL_NAMES = {**NAMES, "suffix": "input_suffix", "prompt": "input_prefix"}
BANNED = -float("inf")  # the logit of a token that never comes
UNNAMED = "file"  # the name of a file that has none

router = APIRouter()
form: dict[str, Any] = {"error": documents.LlamaError}
streamed: dict[str, Any] = {**form, "chunk": documents.LlamaPiece, "last": "or a LlamaError, the last of each text is a LlamaCompletion"}
for begin in ("/completion", "/infill", "/props", "/apply-template"):
    errors.FORMS[begin] = error_body


@router.post("/completion", **answers(documents.LlamaReply, *WORKING, **streamed))
@router.post("/completions", **answers(documents.LlamaReply, *WORKING, **streamed))
async def completion(http: Request, body: CompletionRequest) -> Response:
    """Continues a prompt, or several, in llama.cpp's own form."""
    here = service(http)
    try:
        prompts = body.prompts
    except ValueError:
        raise Refused(400, "prompt: a list of tokens holds texts and tokens only", "prompt") from None
    found = [prompt.tokens for prompt in await here.prompts.mixed(prompts, here.deadline)]
    return await _complete(http, here, body, {"prompt": found}, NAMES)


@router.post("/infill", **answers(documents.LlamaReply, *WORKING, **streamed))
async def infill(http: Request, body: InfillRequest) -> Response:
    """Fills what is between two texts."""
    files = [(one.filename or UNNAMED, one.text) for one in body.input_extra or ()]
    own = {"prompt": (body.input_prefix or "") + (body.prompt or ""), "suffix": body.input_suffix or ""}
    return await _complete(http, service(http), body, own, FILL_NAMES, files=files)


@router.get("/props", **answers(documents.LlamaProps, **form))
async def props(http: Request) -> dict[str, Any]:
    """What is served, and the defaults of sampling."""
    here = service(http)
    llm, tokenizer = here.llm, here.llm.tokenizer
    named = tokenizer.vocabulary.named
    return {
        "default_generation_settings": {"n_ctx": llm.max_model_len, "params": settings(llm.params(), llm.max_model_len)},
        "total_slots": llm.scheduler.max_seqs,
        "model_alias": here.names[0],
        "model_path": here.names[0],
        "chat_template": tokenizer.template(here.config.chat_template) if here.config.chat_template or tokenizer.has_template else "",
        "chat_template_caps": {},
        "modalities": {"vision": False, "audio": False},
        "bos_token": named.get("bos_token", ""),
        "eos_token": named.get("eos_token", ""),
        "build_info": f"redraft-{__version__}",
        "is_sleeping": False,
    }


@router.post("/apply-template", **answers(documents.LlamaPrompt, 404, 504, **form))
async def apply_template(http: Request, body: TemplateRequest) -> dict[str, str]:
    """A conversation as the chat template renders it."""
    here = service(http)
    here.known(body.model)
    given = {name: getattr(body, name) for name in TemplateRequest.model_fields}
    prompt = await here.prompts.conversation(made(schema.ChatRequest, given), here.deadline)
    return {"prompt": prompt.text}


async def _complete(http: Request, here: Service, body: Options, own: dict[str, Any], names: dict[str, str], **more: Any) -> Response:
    wanted = {"grammar": body.grammar} if body.grammar else None if body.json_schema is None else {"json": closed(body.json_schema)}
    values = body.tuned() | {
        "model": body.model,
        "stream": body.stream,
        "n": body.n_cmpl,
        "max_tokens": None if body.n_predict == -1 else body.n_predict,
        "logprobs": body.n_probs or None,
        "ignore_eos": body.ignore_eos,
        "structured_outputs": wanted,
    }
    asked = Asked(body, here.llm.max_model_len, here.known(body.model))
    reply = complete(
        http, made(schema.CompletionRequest, values | own), partial(LlamaWriter, asked), "llama-",
        logit_bias=await _bias(here, body), **more,
    )  # fmt: skip
    return await renaming(reply, names)


async def _bias(here: Service, body: Options) -> dict[int, float] | None:
    """What is added to the logits of tokens. A text stands for each of its tokens."""
    if not body.logit_bias:
        return None
    pairs = body.logit_bias.items() if isinstance(body.logit_bias, dict) else body.logit_bias
    found: dict[int, float] = {}
    for spelled, amount in pairs:
        added = BANNED if amount is False else amount
        if isinstance(spelled, str) and not (isinstance(body.logit_bias, dict) and spelled.isdigit()):
            (prompt,) = await here.prompts.read(spelled, here.deadline, special=False, field="logit_bias")
            found |= dict.fromkeys(prompt.tokens, added)
        elif int(spelled) < here.llm.spec.vocab:
            found[int(spelled)] = added
        else:
            raise Refused(400, f"logit_bias: token {spelled} is not in 0..{here.llm.spec.vocab - 1}", "logit_bias")
    return found
