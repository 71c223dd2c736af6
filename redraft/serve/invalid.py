"""What is wrong in a body: the message and the field of the answer."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, TypeVar

from pydantic import ValidationError

from redraft.serve.errors import Refused, clean
from redraft.serve.schema import Body, near_field

OBJECTS = {"dict_type", "model_type", "model_attributes_type"}  # pydantic's names of errors about what is no object
B = TypeVar("B", bound=Body)


def made(kind: type[B], fields: dict[str, Any]) -> B:
    """A body made of another interface's fields. Refused (400) if it is not valid."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        errors = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise Refused(400, *wrong(errors, fields)) from None


def wrong(errors: Seq[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:
    """(message, field) of the first error in a body. If a body has several allowed forms, the error of the nearest form."""
    if isinstance(body, bytes):
        return "the body is not read: its content type is not JSON", None
    same = (one for one in errors if one["loc"][:2] == errors[0]["loc"][:2])
    first = max(same, key=lambda one: (len(one["loc"]), not str(one["type"]).endswith("_type")))
    parts, around = [], body
    for part in first["loc"][1 : -1 if first["type"] == "missing" else None]:  # among them are names of types
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            parts.append(str(part))
            around, body = body, body[part]
    if first["type"] == "missing":
        parts.append(str(first["loc"][-1]))
    if first["loc"][0] == "query":
        parts = [str(first["loc"][1])]
    place = ".".join(parts)
    kind, text = first["type"], str(first["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        near = near_field(parts[-1], around) if parts else None
        return f"unknown field {place!r}" + (f"; did you mean {near!r}?" if near else ""), place
    if kind == "json_invalid":
        return f"the body is not JSON: {first.get('ctx', {}).get('error', text)}", None
    if kind == "value_error" and not place:
        return text, text.partition(":")[0] or None
    if kind == "missing":
        return f"{place or 'body'}: field required", place or None
    if kind in OBJECTS:
        text = "an object is allowed"
    given = clean(repr(first.get("input")))[:80]
    return f"{place or 'body'} = {given}: {text[:1].lower()}{text[1:]}", place or None
