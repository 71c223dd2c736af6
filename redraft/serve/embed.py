"""The way of texts through the service that become vectors, in whichever form their request came."""

from __future__ import annotations

import numpy as np
from fastapi import Request
from numpy.typing import NDArray

from redraft.core.sequence import Pooling
from redraft.serve import schema
from redraft.serve.errors import Refused
from redraft.serve.service import service


async def vectors(http: Request, body: schema.EmbeddingRequest) -> tuple[list[NDArray[np.float32]], int]:
    """f32[hidden] for each text, and the number of tokens of all."""
    here = service(http)
    deadline, lora = here.deadline, here.chosen(http, body.model)
    size = here.llm.spec.hidden
    if body.dimensions not in (None, size):
        raise Refused(400, f"dimensions = {body.dimensions}: this model has {size}, and fewer are not supported", "dimensions")
    prompts = await here.prompts.read(body.input, deadline, field="input")
    submissions = await here.read(prompts, http, body, deadline, lora, Pooling(body.pooling or "last"))
    found = [submission.request.embedding(body.normalize is not False).astype(np.float32) for submission in submissions]
    return found, sum(len(prompt.tokens) for prompt in prompts)
