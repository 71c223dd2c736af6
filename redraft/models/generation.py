"""generation_config.json: where a text ends, and the default sampling parameters of a checkpoint.

Every field of transformers' GenerationConfig that changes a text is applied or refused. max_new_tokens limits texts of requests without a
max_tokens of their own. These are ignored, because they belong to the caller: other limits of length and time, what is returned, the
kind of cache, and drafting. Unknown fields are ignored as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from redraft.config import SamplingParams
from redraft.errors import CheckpointError, InvalidInput, Unsupported, shown
from redraft.models.config import read_json
from redraft.models.gguf import file as gguf
from redraft.models.gguf.config import sampling

FILE = "generation_config.json"

# field of the file -> field of SamplingParams
_SAME = {
    name: name
    for name in (
        "temperature", "top_k", "top_p", "min_p", "typical_p", "xtc_probability", "xtc_threshold", "mirostat", "mirostat_tau",
        "mirostat_eta", "repetition_penalty",
    )
}  # fmt: skip
_APPLIED = {**_SAME, "min_new_tokens": "min_tokens", "max_new_tokens": "max_tokens", "stop_strings": "stop"}

# unsupported field -> whether a value changes the text
_REFUSED: dict[str, Callable[[Any], bool]] = {
    "num_beams": lambda value: value > 1,  # without it the other fields of beam search change nothing
    "num_beam_groups": lambda value: value > 1,
    "constraints": bool,
    "force_words_ids": bool,
    "dola_layers": bool,
    "guidance_scale": lambda value: value != 1,
    "no_repeat_ngram_size": lambda value: value > 0,
    "encoder_repetition_penalty": lambda value: value != 1,  # transformers applies both encoder fields to a decoder's prompt
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


def read_eos(folder: Path, otherwise: Any, where: Path, vocab: int) -> tuple[int, ...]:
    """The ids that end a text: the file's, else `otherwise`, which the file `where` holds. Ids outside the vocabulary are dropped."""
    file = folder / FILE
    eos = read_json(file).get("eos_token_id") if file.exists() else None
    if eos is None:
        eos, file = otherwise, where
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int for i in ids):
        raise CheckpointError(f"{file}: eos_token_id = {shown(eos)} is neither a token id nor a list of token ids")
    return tuple(i for i in ids if 0 <= i < vocab)


def read_defaults(folder: Path, eos_ids: tuple[int, ...], vocab: int) -> dict[str, Any]:
    """Fields of SamplingParams that the folder's file, or a GGUF file, sets. Unsupported names a field that would change the text and
    cannot be applied. CheckpointError names a field that is out of range."""
    file = folder if folder.is_file() else folder / FILE
    raw = sampling(gguf.read(file)) if folder.is_file() else read_json(file) if file.exists() else {}
    raw = {name: value for name, value in raw.items() if value is not None}
    try:
        _refuse(raw)
        found = {to: raw[name] for name, to in _APPLIED.items() if name in raw}
        if raw.get("do_sample") is False:
            found["temperature"] = 0.0
        if found.get("top_p") == 0:  # transformers then keeps the likeliest token
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
    """The fields of SamplingParams in `given`, then those in a checkpoint's `defaults`. logit_bias merges by token. A given max_tokens
    lowers a default min_tokens, and a given min_tokens raises a default max_tokens."""
    found = {**defaults, **given}
    if "logit_bias" in defaults:
        found["logit_bias"] = {**defaults["logit_bias"], **given.get("logit_bias", {})}
    if "min_tokens" in defaults and "min_tokens" not in given and (max_tokens := given.get("max_tokens")) is not None:
        found["min_tokens"] = min(defaults["min_tokens"], max_tokens)
    if "max_tokens" in defaults and "max_tokens" not in given and (min_tokens := given.get("min_tokens")) is not None:
        found["max_tokens"] = max(defaults["max_tokens"], min_tokens)
    return found


def _refuse(raw: dict[str, Any]) -> None:
    sampled = raw.get("do_sample")  # if it is missing, transformers is greedy, but Redraft samples
    rules = _REFUSED | ({} if sampled is False else _REFUSED_WHEN_SAMPLING) | ({} if sampled is True else _REFUSED_WHEN_GREEDY)
    for name, changes in rules.items():
        try:
            changed = name in raw and changes(raw[name])
        except TypeError:
            raise CheckpointError(f"{name} = {shown(raw[name])}: not a number") from None
        if changed:
            raise _unsupported(name, raw[name])


def _unsupported(name: str, value: Any) -> Unsupported:
    how = "generation_config='none' (--generation-config none) ignores all sampling fields of this file"
    return Unsupported(f"{name} = {shown(value)} changes the text and is not supported; {how}")


def _bias(raw: dict[str, Any], eos_ids: tuple[int, ...], vocab: int) -> dict[int, float]:
    """logit_bias for single tokens that the file bans or weights."""
    found = {_single("sequence_bias", raw, ids, vocab): float(amount) for ids, amount in _pairs(raw.get("sequence_bias", []))}
    alone = [[eos] for eos in eos_ids]  # transformers does not ban these
    banned = [("bad_words_ids", ids) for ids in _list("bad_words_ids", raw) if ids not in alone]
    banned += [("suppress_tokens", [token]) for token in _list("suppress_tokens", raw)]
    return found | {_single(name, raw, ids, vocab): -math.inf for name, ids in banned}


def _list(name: str, raw: dict[str, Any]) -> list[Any]:
    if not isinstance(found := raw.get(name, []), list):
        raise CheckpointError(f"{name} = {shown(found)}: a list is needed")
    return found


def _pairs(bias: Any) -> list[tuple[list[int], float]]:
    """sequence_bias as pairs. In JSON it is a list of pairs, because keys of an object cannot be lists."""
    if not isinstance(bias, list) or not all(isinstance(one, list) and len(one) == 2 for one in bias):
        raise CheckpointError(f"sequence_bias = {shown(bias)}: a list of [[token ids], bias] is needed")
    return [(ids, amount) for ids, amount in bias]


def _single(name: str, raw: dict[str, Any], ids: Any, vocab: int) -> int:
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise CheckpointError(f"{name} = {shown(raw[name])}: {shown(ids)} is not a list of token ids")
    if len(ids) != 1:
        raise _unsupported(name, raw[name])
    if not 0 <= ids[0] < vocab:
        raise CheckpointError(f"{name}: {ids[0]} is not a token id in 0..{vocab - 1}")
    return int(ids[0])
