"""The JSON files of a checkpoint, the fields of its config as attributes, and what a family makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from redraft.core.spec import ModelSpec
from redraft.errors import CheckpointError, shown

_KINDS: dict[type, tuple[tuple[type, ...], str]] = {  # of a default -> allowed types of the field, and their name
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
}


class Config(SimpleNamespace):
    """Fields in the names of config.json. A field that neither the file nor the family's defaults have raises AttributeError."""

    def over(self, defaults: Mapping[str, Any]) -> Config:
        """With defaults for missing fields. CheckpointError names a field of another type than its default; null is always allowed."""
        for name, default in defaults.items():
            value = getattr(self, name, None)
            types, allowed = _KINDS.get(type(default), ((object,), ""))
            if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types and bool(allowed))):
                raise CheckpointError(f"{name} = {shown(value)}: must be {allowed}")
        return Config(**{**defaults, **vars(self)})


class Family(NamedTuple):
    """name: `model_type` in config.json; defaults: of fields that a config may leave out, those of the family's class in transformers;
    spec: makes the network of a config that has all of them; eos: the end of a text if the config names none."""

    name: str
    defaults: Mapping[str, Any]
    spec: Callable[[Config], ModelSpec]
    eos: int | None = None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. CheckpointError names the file."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last for deep nesting
        raise CheckpointError(f"{file}: not readable as JSON: {first_line(error)}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: a JSON {type(raw).__name__}, not an object")
    return raw


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not empty; else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
