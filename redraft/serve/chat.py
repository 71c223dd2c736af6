"""The way of a conversation through the service, in whichever form its request came and its reply goes."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial

from fastapi import Request
from fastapi.responses import Response

from redraft.serve import schema
from redraft.serve.errors import Refused
from redraft.serve.provenance import ALTERNATIVES
from redraft.serve.reply import Writer
from redraft.serve.service import service, within


async def converse(http: Request, body: schema.ChatRequest, form: Callable[..., Writer], prefix: str) -> Response:
    """Replies to a conversation. form: makes the writer, with the arguments of Writer; prefix: of the reply's id."""
    here = service(http)
    deadline = here.deadline
    lora = here.chosen(http, body.model)
    check_stream(body)
    within("top_logprobs", body.top_logprobs, here.config.max_logprobs)
    if body.top_logprobs and not body.logprobs:
        raise Refused(400, "top_logprobs needs logprobs", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None and body.max_tokens != body.max_completion_tokens:
        raise Refused(400, "max_tokens and max_completion_tokens differ: give one of them", "max_completion_tokens")
    requested = (body.top_logprobs or 0) if body.logprobs else None
    likeliest = max(requested or 0, ALTERNATIVES + 1) if body.provenance else requested
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params = here.params(body, max_tokens=max_tokens, logprobs=likeliest, provenance=body.provenance, lora=lora)
    if body.reasoning_effort is not None:
        effort = here.effort(body.reasoning_effort, "reasoning_effort", body.tools)
        body.chat_template_kwargs = {**(body.chat_template_kwargs or {}), **effort}
    prompt = await here.prompts.conversation(body, deadline)
    reading, params = await here.prompts.reading(body, prompt, params, deadline)
    name = f"{prefix}{secrets.token_hex(12)}"
    wanted = here.wanted(body, params, id=name, logprobs=requested, parser=reading.parser, hidden=reading.hidden)
    return await here.reply(http, body, [prompt], params, partial(form, wanted), deadline)


def check_stream(body: schema.Sampled) -> None:
    if body.stream and body.prompt_logprobs is not None:
        raise Refused(400, "prompt_logprobs is not supported with stream", "prompt_logprobs")
    if body.stream_options is not None and body.stream_options.include_usage and not body.stream:
        raise Refused(400, "stream_options needs stream", "stream_options")
