"""What callers give to `LLM`, checked: prompts, conversations, parameters and patches. Every error is one line."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Set
from collections.abc import Sequence as Seq
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from redraft import registry
from redraft.config import SamplingParams, is_utf8
from redraft.core.sequence import Wants
from redraft.core.tree import F32
from redraft.errors import InvalidInput, shown
from redraft.ops.arrays import array

Prompt = str | Seq[int] | Mapping[str, Any]
Conversation = Seq[Mapping[str, Any]]
Tools = Seq[Mapping[str, Any]]
Params = SamplingParams | Seq[SamplingParams | None] | None

SOURCES = ("prompt", "prompt_token_ids", "messages", "prompt_embeds", "segments")
OPTIONS = ("context", "before", "reuse", "wants")
FILLED = ("suffix", "tools")  # what stands after the gap that follows a prompt; what a conversation may call
PROMPT = "a string, a list of token ids, or a mapping with prompt, prompt_token_ids, messages, prompt_embeds or segments"
STAND_IN = 0  # the token of a row that is a vector


class Patch(NamedTuple):
    """`text` replaces the characters start..end (end excluded) of a text. start = end inserts; an empty text deletes."""

    start: int
    end: int
    text: str


def prompts_of(given: Any) -> tuple[list[Any], bool]:
    """The prompts of a call, and whether it gave a single prompt rather than a list."""
    if isinstance(given, (str, Mapping)):
        return [given], True
    many = elements(given, "prompts", f"{PROMPT}, or a list of these")
    if many and all(integer(one) is not None for one in many):
        return [many], True
    return many, False


def conversations_of(given: Any) -> tuple[list[Any], bool]:
    """The conversations of a call, and whether it gave a single one. A single one is a list of messages."""
    many = elements(given, "messages", "a list of messages, or a list of such lists")
    if not many:
        raise InvalidInput("messages is empty: at least one message is needed")
    return ([many], True) if isinstance(many[0], Mapping) else (many, False)


def params_of(count: int, given: Any, fields: Mapping[str, Any]) -> list[SamplingParams | None]:
    """One SamplingParams for each of `count` prompts, from an object, a list of objects, or the fields as keywords."""
    if fields:
        if given is not None:
            raise InvalidInput(f"sampling_params and the keyword {min(fields)!r} are both given: give one of the two")
        given = SamplingParams(**fields)
    if given is None or isinstance(given, SamplingParams):
        return [given] * count
    every = elements(given, "sampling_params", "SamplingParams or a list of them")
    if len(every) != count:
        raise InvalidInput(f"{count} prompts but {len(every)} sampling params: give one, or one each")
    for i, one in enumerate(every):
        if not isinstance(one, SamplingParams | None):
            raise InvalidInput(f"sampling_params[{i}] is a {type(one).__name__}: SamplingParams is needed")
    return every


def fields_of(prompt: Any) -> dict[str, Any]:
    """One prompt as a mapping of SOURCES, FILLED and OPTIONS. The values of the latter two are checked, None counts as not given."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if not isinstance(prompt, Mapping):
        return {"prompt_token_ids": elements(prompt, "prompt", PROMPT)}
    if unknown := [name for name in prompt if name not in (*SOURCES, *FILLED, *OPTIONS)]:
        allowed = "prompt, prompt_token_ids, prompt_embeds, segments, messages, suffix, tools, context, before and reuse are allowed"
        raise InvalidInput(f"prompt has an unknown key {shown(unknown[0])}: {allowed}")
    fields = {name: value for name, value in prompt.items() if value is not None}
    if not fields.keys() & set(SOURCES):
        raise InvalidInput("prompt has none of prompt, prompt_token_ids, prompt_embeds, segments and messages: one is needed")
    _check_options(fields)
    return fields


def reusing(prompts: list[Any], reuse: Any) -> list[Any]:
    """The prompts of a call; those that name no reuse method get `reuse`, if they have what it needs."""
    if reuse is None:
        return prompts
    if not isinstance(reuse, str):
        raise InvalidInput(f"reuse = {shown(reuse)}: the name of a reuse method is needed")
    if not registry.create("reuse", reuse).needs:
        sources = ("prompt" if isinstance(one, str) else "prompt_token_ids" for one in prompts)
        return [{"reuse": reuse, **(one if isinstance(one, Mapping) else {name: one})} for name, one in zip(sources, prompts, strict=True)]
    found = [isinstance(one, Mapping) and one.get("segments") is not None for one in prompts]
    if not any(found):
        raise InvalidInput(f"reuse = {shown(reuse)}: no prompt has segments")
    return [{"reuse": reuse, **one} if segments else one for one, segments in zip(prompts, found, strict=True)]


def _check_options(fields: dict[str, Any]) -> None:
    kinds: dict[str, tuple[type, str]] = {
        "prompt": (str, "a string"),
        "suffix": (str, "a string"),
        "reuse": (str, "the name of a reuse method"),
        "wants": (Wants, "a Wants, as LLM.embed gives it,"),
    }
    for name, (kind, needed) in kinds.items():
        if name in fields and not isinstance(fields[name], kind):
            raise InvalidInput(f"{name} = {shown(fields[name])}: {needed} is needed")
    if "suffix" in fields and not ("prompt" in fields and fields.keys().isdisjoint(("prompt_token_ids", "messages"))):
        raise InvalidInput("suffix: only a prompt that is a text has one")
    if "tools" in fields and not ("messages" in fields and fields.keys().isdisjoint(("prompt_token_ids", "prompt"))):
        raise InvalidInput("tools: only a conversation has them")
    if "prompt_embeds" in fields and not fields.keys().isdisjoint(("prompt", "messages")):
        raise InvalidInput("prompt_embeds: beside it only prompt_token_ids are allowed, as many, for its rows of NaN")
    if "segments" in fields and not fields.keys().isdisjoint(set(SOURCES) - {"segments"}):
        raise InvalidInput("segments: they are the whole prompt, so no other prompt is allowed beside them")
    if "context" in fields:
        fields["context"] = integer(context := fields["context"])
        if fields["context"] is None:
            raise InvalidInput(f"context = {shown(context)}: a number of tokens is needed")
    if "before" in fields:
        fields["before"] = token_ids(fields["before"], "before")


def token_ids(given: Any, name: str = "prompt_token_ids") -> list[int]:
    """Token ids as integers. The engine checks their range."""
    found = []
    for i, value in enumerate(elements(given, name, "a list of token ids")):
        if (token := integer(value)) is None:
            raise InvalidInput(f"{name}[{i}] = {shown(value)}: not a token id")
        found.append(token)
    return found


def vectors_of(given: Any, tokens: Seq[int] | None = None) -> tuple[list[int], F32]:
    """A prompt of vectors [n, hidden], an array or a tensor: its tokens, and f32[n, hidden]. Rows of NaN start from their token of
    `tokens`. The engine checks the hidden size."""
    try:
        given = array(given) if hasattr(given, "dtype") else np.asarray(given)
        if given.dtype.kind == "c":
            raise TypeError
        with np.errstate(over="ignore"):
            found = np.ascontiguousarray(given, np.float32)
    except (TypeError, ValueError, AttributeError):
        raise InvalidInput(f"prompt_embeds of type {type(given).__name__}: an array of numbers is needed") from None
    if found.ndim != 2 or not found.size or given.dtype.kind in "bOSU":
        raise InvalidInput(f"prompt_embeds of shape {list(found.shape)}: numbers of shape [tokens, hidden size] are needed")
    if tokens is not None and len(tokens) != len(found):
        raise InvalidInput(f"prompt_embeds has {len(found)} rows, but prompt_token_ids {len(tokens)} tokens: as many are needed")
    absent = np.asarray(np.isnan(found).all(1))
    if len(wrong := np.flatnonzero(~np.isfinite(found).all(1) & (~absent | (tokens is None)))):
        needed = "rows of NaN need prompt_token_ids" if absent[wrong[0]] else "finite float32 numbers are needed"
        raise InvalidInput(f"prompt_embeds[{wrong[0]}] holds NaN or infinity: {needed}")
    return [STAND_IN if tokens is None or not gap else tokens[i] for i, gap in enumerate(absent.tolist())], found


def segments_of(given: Any, encode: Callable[[str, bool], list[int]], name: str = "") -> tuple[list[int], list[tuple[int, int]]]:
    """A prompt of segments, each a text or token ids: all its tokens, and where the segments between the first and the last are.
    encode(text, first): the tokens of a segment. name: of the segments in errors."""
    segments = elements(given, "segments", "a list of texts or lists of token ids")
    if len(segments) < 2:
        raise InvalidInput(f"segments has {len(segments)} elements: a head, any number of chunks and a last part are needed")
    tokens: list[int] = []
    ends = []
    for i, segment in enumerate(segments):
        own = name or f"segments[{i}]"
        found = encode(text_of(segment, own), i == 0) if isinstance(segment, str) else token_ids(segment, own)
        if not found:
            raise InvalidInput(f"{own} is empty: at least one token is needed")
        tokens += found
        ends.append(len(tokens))
    return tokens, list(pairwise(ends[:-1]))


def messages_of(given: Any) -> list[Mapping[str, Any]]:
    """One conversation. The chat template checks what a message holds."""
    found = elements(given, "messages", "a list of messages")
    for i, message in enumerate(found):
        if not isinstance(message, Mapping) or not all(isinstance(name, str) for name in message):
            raise InvalidInput(f"messages[{i}] = {shown(message)}: a mapping with role and content is needed")
    if not found:
        raise InvalidInput("messages is empty: at least one message is needed")
    return found


def tools_of(given: Any) -> list[Mapping[str, Any]]:
    """Functions that a conversation may call, in OpenAI's form."""
    found = elements(given, "tools", "a list of tools")
    for i, tool in enumerate(found):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidInput(f'tools[{i}] = {shown(tool)}: {{"type": "function", "function": {{"name": ...}}}} is needed')
    return found


def text_of(text: str, name: str) -> str:
    """The same text, if it can be tokenized."""
    if not is_utf8(text):
        raise InvalidInput(f"{name} holds half of a surrogate pair, which UTF-8 cannot encode")
    return text


def elements(given: Any, name: str, needed: str) -> list[Any]:
    """The elements of a list, array or iterator. Sets have no order and bytes are not text, so both are refused."""
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes, bytearray, memoryview, Mapping, Set)):
        try:
            return list(given)
        except TypeError:  # an array without dimensions
            pass
    raise InvalidInput(f"{name} of type {type(given).__name__}: {needed} is needed")


def integer(value: Any) -> int | None:
    """An integer of Python, numpy or torch; None for anything else. Booleans and arrays are not accepted as integers."""
    if isinstance(value, (bool, np.bool_)) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def patched(text: str, patches: Any) -> str:
    """The text after all patches. Their positions are those in the text before any of them; they must not overlap."""
    many = [patches] if isinstance(patches, Patch) else elements(patches, "patch", "a Patch or a list of them")
    for i, patch in enumerate(many):
        if not isinstance(patch, Patch) or [type(part) for part in patch] != [int, int, str]:
            raise InvalidInput(f"patch[{i}] = {shown(patch)}: a Patch of two positions and a text is needed")
    parts, at = [], 0
    for start, end, new in sorted(many):
        if not at <= start <= end <= len(text):
            allowed = f"{at} <= start <= end <= {len(text)}"
            raise InvalidInput(f"patch = ({start}, {end}, ...): outside of the text or over another patch; {allowed} is allowed")
        parts += [text[at:start], new]
        at = end
    return "".join([*parts, text[at:]])
