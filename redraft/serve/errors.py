"""Errors in the form of OpenAI's API: a status and {"error": {message, type, param, code}}.

Replies name no path of this machine. A word with a slash in an error's text is hidden unless the client sent it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import BaseModel

from redraft.errors import CheckpointError, OutOfMemory, PromptTooLong, RedraftError, Unavailable
from redraft.sample.sampler import NotNumbers

FORMS: dict[str, Callable[[Refused], dict[str, Any]]] = {}  # begin of a path -> the form of its errors, if it is not OpenAI's
MAX_MESSAGE = 400  # characters of a message, which may quote what the client sent
POINTER = "#/"  # begins a place in a JSON document
HIDDEN = "(path)"  # replaces a path of this machine
PATH = re.compile(r"""[^\s'"([{<=]*[/\\][^\s'"]*(?<![])}>,:;.])""")  # a word with a separator of paths, its punctuation aside
T = TypeVar("T")
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
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


log = logging.getLogger("redraft.serve")


class ErrorBody(BaseModel):
    """The error. param: the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    error: ErrorBody


@dataclass
class Refused(Exception):
    """A request is refused with this answer."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        error = ErrorBody(message=clean(self.message), type=TYPES[self.status], param=self.param and clean(self.param), code=self.code)
        return {"error": error.model_dump()}


def body_of(error: Refused, path: str) -> dict[str, Any]:
    """The body of the answer, in the form of the interface to which the path belongs."""
    form = next((form for begin, form in FORMS.items() if path.startswith(begin)), None)
    return error.body if form is None else form(error)


def renamed(error: Refused, names: Mapping[str, str]) -> Refused:
    """The same error with the names that fields have in another interface. names: field, or the begin of one -> its name there."""
    for old, new in names.items():
        if error.param is not None and (error.param == old or error.param.startswith(old + ".")):
            message = new + error.message.removeprefix(old) if error.message.startswith(old) else error.message
            return replace(error, message=message, param=new)
    return error


async def renaming(reply: Awaitable[T], names: Mapping[str, str]) -> T:
    """The reply, or its error with the names that fields have in another interface."""
    try:
        return await reply
    except (Refused, RedraftError) as error:
        raise renamed(refused(error), names) from None


def refused(error: Exception, *known: str) -> Refused:
    """The reply to an exception: its text if it is meant for users, else a fixed text. known: texts whose words a reply may contain,
    such as the client's own."""
    match error:
        case Refused():
            return error
        case OutOfMemory():
            return Refused(503, "out of memory for this request", headers={"Retry-After": "1"})
        case Unavailable():
            return Refused(503, str(error), headers={"Retry-After": "5"})
        case NotNumbers():
            return Refused(500, str(error), code="not_a_number")
        case CheckpointError():
            log.error("a file that a request needs cannot be used: %s", error)
            return Refused(400, "this server lacks a file that the request's choice needs; its log names it")
        case RedraftError():
            code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
            return Refused(400, without_paths(str(error), *known), _field(str(error)), code)
    return Refused(500, "internal error")


def without_paths(text: str, *known: str) -> str:
    """`text` with HIDDEN for each word that may be a path and is in none of the known texts. A place in a schema is none."""
    hidden = PATH.sub(lambda word: word[0] if word[0].startswith(POINTER) or any(word[0] in one for one in known) else HIDDEN, text)
    if hidden != text:
        log.warning("replied without its paths: %s", text)
    return hidden


def _field(message: str) -> str | None:
    """The field that a message of pydantic or of the engine names at its start."""
    found = re.match(r"(?:SamplingParams(?:\.|: ))?([a-z_]+(?:\[\d+\]|\.[a-z_]+)*)(?: =|:)", message)
    return found[1].replace("[", ".").replace("]", "") if found else None


def clean(text: str) -> str:
    """One line of text that every encoder takes, not too long."""
    text = text.removeprefix("SamplingParams.").removeprefix("SamplingParams: ")
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 4] + " ..."
