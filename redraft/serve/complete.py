"""The way of prompts through the service, in whichever form their request came and its reply goes."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from redraft.serve import schema, vectors
from redraft.serve.chat import check_stream
from redraft.serve.errors import Refused
from redraft.serve.provenance import ALTERNATIVES
from redraft.serve.reply import Writer
from redraft.serve.service import service, within


async def complete(
    http: Request,
    body: schema.CompletionRequest,
    form: Callable[..., Writer],
    prefix: str,
    *,
    max_tokens: int | None = None,
    files: Seq[tuple[str, str]] = (),
    **more: Any,
) -> Response:
    """Continues prompts, or fills what is between a prompt and body.suffix. form: makes the writer, with the arguments of Writer; prefix:
    of the reply's id; max_tokens: if the body has none, None for as many as there is room for; files: (name, text) of further files to
    fill by; more: further fields of SamplingParams."""
    here = service(http)
    deadline = here.deadline
    lora = here.chosen(http, body.model)
    check_stream(body)
    within("logprobs", body.logprobs, here.config.max_logprobs)
    drop = body.max_tokens == 0
    likeliest = body.logprobs
    if body.provenance:
        likeliest = max(likeliest or 0, ALTERNATIVES + 1)
    params = here.params(
        body,
        max_tokens=max_tokens if body.max_tokens is None else body.max_tokens or 1,
        min_tokens=0 if drop else None,
        logprobs=likeliest,
        prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0) if body.echo and body.logprobs is not None else None,
        provenance=body.provenance,
        lora=lora,
        **more,
    )
    special = body.add_special_tokens is not False
    given = body.prompt or ""
    if body.prompt_embeds is not None:
        prompts = vectors.prompts(body.prompt_embeds, here.llm.spec.hidden, here.config.max_queue)
    elif body.segments is not None:
        prompts = [await here.prompts.joined(body.segments, deadline, special=special)]
    elif body.suffix is None:
        prompts = await here.prompts.read(given, deadline, special=special, texts=bool(body.echo))
    else:
        if body.echo:
            raise Refused(400, "suffix and echo exclude each other", "echo")
        prompts = await here.prompts.filled(given, body.suffix, deadline, special=special, files=files, room=params.max_tokens or 1)
        params = here.llm.fill.params(params)
    wanted = here.wanted(body, params, id=f"{prefix}{secrets.token_hex(12)}", logprobs=body.logprobs, echo=bool(body.echo), drop=drop)
    return await here.reply(http, body, prompts, params, partial(form, wanted), deadline)
