"""Texts scored, and documents ranked, by the log-probabilities that the model gives to their tokens. No text is generated."""

from __future__ import annotations

import math
import secrets
import time
from typing import Any

from fastapi import APIRouter, Request

from redraft.serve.documents import WORKING, answers
from redraft.serve.prompts import Prompt
from redraft.serve.reply import finite
from redraft.serve.score_schema import Judged, Ranking, RerankRequest, ScoreRequest, Scores
from redraft.serve.service import service

DOCUMENT = "Document: {}\n\nQuery:"  # what precedes a query whose likelihood ranks a document

router = APIRouter()


@router.post("/v1/score", **answers(Scores, *WORKING))
@router.post("/score", **answers(Scores, *WORKING))
async def score(http: Request, body: ScoreRequest) -> dict[str, Any]:
    """The mean log-probability of each text as the continuation of the one before it."""
    before = body.before * (len(body.scored) // len(body.before))
    field = "text_2" if body.documents is None else "documents"
    means, said = await _means(http, body, [*zip(before, body.scored, strict=True)], field)
    data = [{"index": index, "object": "score", "score": mean} for index, mean in enumerate(means)]
    return {"id": f"score-{secrets.token_hex(12)}", "object": "list", "created": int(time.time()), "data": data, **said}


@router.post("/rerank", **answers(Ranking, *WORKING))
@router.post("/v1/rerank", **answers(Ranking, *WORKING))
@router.post("/v2/rerank", **answers(Ranking, *WORKING))
async def rerank(http: Request, body: RerankRequest) -> dict[str, Any]:
    """Documents by how likely the model finds the query after each."""
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    means, said = await _means(http, body, [(DOCUMENT.format(text), f" {body.query}") for text in texts], "documents")
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": math.exp(mean)} for index, mean in enumerate(means)]
    results.sort(key=lambda one: -means[one["index"]])  # stable: of equal ones the first stays first
    if body.return_documents is not False:
        for one in results:
            one["document"] = {"text": texts[one["index"]]}
    return {"id": f"rerank-{secrets.token_hex(12)}", "results": results[: body.top_n], **said}


async def _means(http: Request, body: Judged, pairs: list[tuple[str, str]], field: str) -> tuple[list[float], dict[str, Any]]:
    """The mean log-probability of each continuation, and what every answer says: the model and the usage. pairs: of a context and its
    continuation."""
    here = service(http)
    deadline, lora = here.deadline, here.chosen(http, body.model)
    prompts = await here.prompts.continued(pairs, deadline, field)
    requests = [submission.request for submission in await here.read(prompts, http, body, deadline, lora)]
    means = [_mean(prompt, request.prompt_logprobs) for prompt, request in zip(prompts, requests, strict=True)]
    count = sum(len(prompt.tokens) for prompt in prompts)
    details = {"cached_tokens": sum(request.cached_tokens or 0 for request in requests)}
    usage = {"prompt_tokens": count, "total_tokens": count, "prompt_tokens_details": details}
    return means, {"model": body.model or here.names[0], "usage": usage}


def _mean(prompt: Prompt, entries: list[Any]) -> float:
    found = [finite(entry.logprob) for entry in entries[prompt.scored :]]
    return math.fsum(found) / len(found)
