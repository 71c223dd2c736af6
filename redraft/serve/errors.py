"""Errors as OpenAI's clients know them: a status and {"error": {message, type, param, code}}. Nothing of the inside is told."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from redraft.errors import OutOfMemory, PromptTooLong, RedraftError
from redraft.sample.sampler import NotNumbers

LONGEST = 400  # letters of a message: what clients sent comes back in it
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ErrorBody(BaseModel):
    """What went wrong; param: the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    error: ErrorBody


@dataclass
class Refused(Exception):
    """An answer other than the one asked for."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        error = ErrorBody(message=clean(self.message), type=TYPES[self.status], param=self.param and clean(self.param), code=self.code)
        return {"error": error.model_dump()}


def refused(error: Exception) -> Refused:
    """What clients are told of an exception: the text of those made for users, of others only that there was one."""
    match error:
        case Refused():
            return error
        case PromptTooLong():
            return Refused(400, str(error), _field(str(error)), "context_length_exceeded")
        case OutOfMemory():
            return Refused(503, "out of memory for this request", headers={"Retry-After": "1"})
        case NotNumbers():
            return Refused(500, str(error), code="not_a_number")
        case RedraftError():
            return Refused(400, str(error), _field(str(error)))
    return Refused(500, "internal error")


def _field(message: str) -> str | None:
    """The field that a message of pydantic's or the engine's names at its start."""
    found = re.match(r"(?:SamplingParams(?:\.|: ))?([a-z_]+(?:\[\d+\])?)(?: =|:)", message)
    return found[1] if found else None


def clean(text: str) -> str:
    """One line of text that every encoder takes, not too long."""
    text = text.removeprefix("SamplingParams.").removeprefix("SamplingParams: ")
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."
