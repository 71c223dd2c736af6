"""generation_config.json: where a text ends, and how a checkpoint wants to be sampled.

Every field of transformers' GenerationConfig that changes a text is heeded or refused. Limits of length and time, what is returned,
how the cache is held and how drafts are made belong to the caller and are left out, as are fields that transformers does not know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from redraft.config import SamplingParams
from redraft.errors import CheckpointError, InvalidInput, Unsupported
from redraft.models.checkpoint import read_json

FILE = "generation_config.json"

# field of the file -> field of SamplingParams
_SAME = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")}
_HEEDED = {**_SAME, "min_new_tokens": "min_tokens", "stop_strings": "stop"}

# field that Redraft has no means for -> whether a value changes the text
_REFUSED: dict[str, Callable[[Any], bool]] = {
    "num_beams": lambda value: value > 1,  # the other fields of beam search change nothing without it
    "num_beam_groups": lambda value: value > 1,
    "constraints": bool,
    "force_words_ids": bool,
    "dola_layers": bool,
    "guidance_scale": lambda value: value != 1,
    "no_repeat_ngram_size": lambda value: value > 0,
    "encoder_repetition_penalty": lambda value: value != 1,  # transformers applies both to the prompt of a decoder
    "encoder_no_repeat_ngram_size": lambda value: value > 0,
    "min_length": lambda value: value > 0,  # it counts the prompt
    "forced_bos_token_id": lambda value: True,
    "forced_eos_token_id": lambda value: True,
    "exponential_decay_length_penalty": bool,
    "begin_suppress_tokens": bool,
    "watermarking_config": bool,
    "token_healing": bool,
}
_REFUSED_WHEN_SAMPLING: dict[str, Callable[[Any], bool]] = {
    "epsilon_cutoff": lambda value: 0 < value < 1,
    "eta_cutoff": lambda value: 0 < value < 1,
    "top_h": lambda value: True,
}
_REFUSED_WHEN_GREEDY: dict[str, Callable[[Any], bool]] = {"penalty_alpha": lambda value: value > 0}


def read_eos(folder: Path, otherwise: Any, vocab: int) -> tuple[int, ...]:
    """The ids that end a text: the file's, else `otherwise` (config.json's); those outside of the vocabulary are dropped."""
    file = folder / FILE
    eos = read_json(file).get("eos_token_id") if file.exists() else None
    eos = otherwise if eos is None else eos
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int for i in ids):
        raise CheckpointError(f"{file}: eos_token_id = {eos!r} is neither a token id nor a list of them")
    return tuple(i for i in ids if 0 <= i < vocab)


def read_defaults(folder: Path, eos_ids: tuple[int, ...], vocab: int) -> dict[str, Any]:
    """Fields of SamplingParams that the file sets. Unsupported names a field that would change the text and cannot be heeded,
    CheckpointError one that is out of range."""
    file = folder / FILE
    raw = {name: value for name, value in read_json(file).items() if value is not None} if file.exists() else {}
    try:
        _refuse(raw)
        found = {to: raw[name] for name, to in _HEEDED.items() if name in raw}
        if raw.get("do_sample") is False:
            found["temperature"] = 0.0
        if found.get("top_p") == 0:  # transformers keeps the likeliest token then
            del found["top_p"]
            found["top_k"] = 1
        if bias := _bias(raw, eos_ids, vocab):
            found["logit_bias"] = bias
        SamplingParams(**found)
    except (Unsupported, InvalidInput, CheckpointError) as error:
        kind = Unsupported if isinstance(error, Unsupported) else CheckpointError
        raise kind(f"{file}: {error}") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    return found


def over(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given fields of SamplingParams over a checkpoint's. Biases add up by token; a checkpoint's smallest length gives way to the
    largest that is given."""
    found = {**defaults, **given}
    if "logit_bias" in defaults:
        found["logit_bias"] = {**defaults["logit_bias"], **given.get("logit_bias", {})}
    if "min_tokens" in defaults and "min_tokens" not in given and (most := given.get("max_tokens")) is not None:
        found["min_tokens"] = min(defaults["min_tokens"], most)
    return found


def _refuse(raw: dict[str, Any]) -> None:
    sampled = raw.get("do_sample")  # without it transformers is greedy, and Redraft samples
    rules = _REFUSED | ({} if sampled is False else _REFUSED_WHEN_SAMPLING) | ({} if sampled is True else _REFUSED_WHEN_GREEDY)
    for name, changes in rules.items():
        try:
            changed = name in raw and changes(raw[name])
        except TypeError:
            raise CheckpointError(f"{name} = {raw[name]!r}: not a number") from None
        if changed:
            raise _unsupported(name, raw[name])


def _unsupported(name: str, value: Any) -> Unsupported:
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    how = "generation_config='none' (--generation-config none) ignores all sampling fields of this file"
    return Unsupported(f"{name} = {shown} changes the text and is not supported; {how}")


def _bias(raw: dict[str, Any], eos_ids: tuple[int, ...], vocab: int) -> dict[int, float]:
    """Single tokens that are banned or weighted, as logit_bias."""
    found = {_single("sequence_bias", raw, ids, vocab): float(amount) for ids, amount in _pairs(raw.get("sequence_bias", []))}
    alone = [[eos] for eos in eos_ids]  # transformers lets these pass
    banned = [("bad_words_ids", ids) for ids in _list("bad_words_ids", raw) if ids not in alone]
    banned += [("suppress_tokens", [token]) for token in _list("suppress_tokens", raw)]
    return found | {_single(name, raw, ids, vocab): -math.inf for name, ids in banned}


def _list(name: str, raw: dict[str, Any]) -> list[Any]:
    if not isinstance(found := raw.get(name, []), list):
        raise CheckpointError(f"{name} = {found!r}: a list is needed")
    return found


def _pairs(bias: Any) -> list[tuple[list[int], float]]:
    """A JSON file holds pairs of ids and a number: an object's keys cannot be lists."""
    if not isinstance(bias, list) or not all(isinstance(one, list) and len(one) == 2 for one in bias):
        raise CheckpointError(f"sequence_bias = {bias!r}: a list of [[token ids], bias] is needed")
    return [(ids, amount) for ids, amount in bias]


def _single(name: str, raw: dict[str, Any], ids: Any, vocab: int) -> int:
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise CheckpointError(f"{name} = {raw[name]!r}: {ids!r} is not a list of token ids")
    if len(ids) != 1:
        raise _unsupported(name, raw[name])
    if not 0 <= ids[0] < vocab:
        raise CheckpointError(f"{name}: {ids[0]} is not a token id in 0..{vocab - 1}")
    return int(ids[0])
