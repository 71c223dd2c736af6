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
_SIZES = {  # integers from 1 to a largest value
    **dict.fromkeys((
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "max_position_embeddings", "original_max_position_embeddings", "sliding_window", "num_experts_per_tok", "decoder_sparse_step",
        "no_rope_layer_interval", "n_embd", "n_head", "n_inner", "n_positions",
    ), (1 << 31) - 1),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_experts", "num_local_experts"), 10_000),
}  # fmt: skip
_COUNTS = ("max_window_layers",)  # integers from 0
_LARGEST = 1 << 26  # bytes of a JSON file
_EPSILONS = ("rms_norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon")
_NULL = ("sliding_window", "num_key_value_heads", "head_dim", "n_inner")  # sizes for which null has a meaning


class Config(SimpleNamespace):
    """Fields in the names of config.json. A field that neither the file nor the family's defaults have raises AttributeError."""


def filled(config: Config, defaults: Mapping[str, Any]) -> Config:
    """The config with defaults for missing fields. CheckpointError names a field with a value that no family allows, or of another type
    than its default."""
    for name, value in vars(config).items():
        default = defaults.get(name)
        if name in _SIZES:
            optional = value is None and (default is None or name in _NULL)
            optional |= name == "sliding_window" and value == 0 and not getattr(config, "use_sliding_window", True)  # Qwen2-MoE's
            if not optional and (type(value) is not int or not 0 < value <= _SIZES[name]):
                raise CheckpointError(f"{name} = {shown(value)}: must be an integer from 1 to {_SIZES[name]}")
        elif name in _COUNTS:
            if value is not None and (type(value) is not int or value < 0):
                raise CheckpointError(f"{name} = {shown(value)}: must be an integer, 0 or more")
        elif name in _EPSILONS:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise CheckpointError(f"{name} = {shown(value)}: must be a number from 0 to 1")
        elif value is not None and default is not None and (kind := _KINDS.get(type(default))):
            types, allowed = kind
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise CheckpointError(f"{name} = {shown(value)}: must be {allowed}")
    return Config(**{**defaults, **vars(config)})


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
        if (size := file.stat().st_size) > _LARGEST:
            raise CheckpointError(f"{file}: has {size} bytes: at most {_LARGEST} are read")
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
