"""The fields of a checkpoint's config as attributes, and what a family makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
