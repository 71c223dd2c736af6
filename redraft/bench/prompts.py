"""Reads files of prompts, one JSON object on each line. A suite ships with the package."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from redraft.errors import InvalidInput, did_you_mean

FORMS = ("prompt", "messages", "turns")
NAMES = ("id", "question_id", "task_id")
UNUSED = ("reference", "entry_point", "canonical_solution", "test")  # answers in the files of Spec-Bench and HumanEval
KEYS = {*FORMS, *NAMES, "category", *UNUSED}
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """One prompt in exactly one of three forms. prompt: raw text to continue; messages: a chat so far, each message
    {"role", "content"}; turns: the user's messages, each sent after the model's answer."""

    id: str
    category: str
    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    turns: list[str] | None = None

    @property
    def content(self) -> str:
        """What the model reads, to compare prompts."""
        return json.dumps([self.prompt, self.messages, self.turns])

    def shaped(self, turns: int | None = None, chat: bool = False) -> Prompt:
        """With at most so many turns; chat: a raw text is what the user says."""
        if self.prompt is not None and chat:
            return replace(self, prompt=None, turns=[self.prompt])
        return self if self.turns is None else replace(self, turns=self.turns[:turns])


def load(
    path: str | Path | None = None,
    categories: Seq[str] | None = None,
    limit: int | None = None,
    *,
    turns: int | None = None,
    chat: bool = False,
    without: Seq[Prompt] = (),
) -> list[Prompt]:
    """The prompts of a file in its order; None: our suite. Lines without an id get their line number, lines without a
    category "all".

    categories: only these. limit: at most this many, taken evenly from the categories, the first of each. turns, chat: see
    Prompt.shaped. without: prompts that are left out, whatever their ids. InvalidInput names file and
    line: a file that cannot be read, bad JSON, an unknown key, none or several of the three forms, an empty text, an id used twice, an
    unknown category.
    """
    for option, value in (("limit", limit), ("turns", turns)):
        if value is not None and value < 1:
            raise InvalidInput(f"{option} = {value}: must be 1 or more")
    source = resources.files("redraft.bench") / "suites" / "redraft.jsonl" if path is None else Path(path)
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InvalidInput(f"{source}: cannot be read ({reason})") from None
    prompts: dict[str, Prompt] = {}
    # not splitlines, because U+2028 and similar may be inside a JSON string
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            prompt = _parse(line, number, f"{source}:{number}")
            if prompt.id in prompts:
                raise InvalidInput(f"{source}:{number}: id {prompt.id!r} is used twice")
            prompts[prompt.id] = prompt
    if not prompts:
        raise InvalidInput(f"{source}: holds no prompts")
    taken = {prompt.content for prompt in without}
    shaped = [prompt.shaped(turns, chat) for prompt in prompts.values()]
    if not (others := [prompt for prompt in shaped if prompt.content not in taken]):
        raise InvalidInput(f"{source}: holds no other prompts")
    return _choose(others, categories, limit)


def _choose(prompts: list[Prompt], categories: Seq[str] | None, limit: int | None) -> list[Prompt]:
    if categories is not None:
        known = {prompt.category for prompt in prompts}
        for category in categories:
            if category not in known:
                raise InvalidInput(f"no category {category!r}: {did_you_mean(category, known)}")
        prompts = [prompt for prompt in prompts if prompt.category in categories]
    if limit is None:
        return prompts
    seen: dict[str, int] = defaultdict(int)
    turn: dict[str, int] = {}  # id -> how many prompts of its category come before it
    for prompt in prompts:
        turn[prompt.id] = seen[prompt.category]
        seen[prompt.category] += 1
    taken = {prompt.id for prompt in sorted(prompts, key=lambda prompt: turn[prompt.id])[:limit]}
    return [prompt for prompt in prompts if prompt.id in taken]


def _parse(line: str, number: int, at: str) -> Prompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{at}: not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError):
        raise InvalidInput(f"{at}: not JSON that can be read: a number or a nesting is too long") from None
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        raise InvalidInput(f"{at}: {_short(value)} is not an object")
    for key in value:
        if key not in KEYS:
            raise InvalidInput(f"{at}: unknown key {key!r}; {did_you_mean(key, KEYS)}")
    forms = [form for form in FORMS if form in value]
    if len(forms) != 1:
        raise InvalidInput(f"{at}: has {' and '.join(forms) or 'no prompt'}; exactly one of {', '.join(FORMS)} is needed")
    (form,) = forms
    if not _CHECKS[form](value[form]):
        raise InvalidInput(f"{at}: {form} = {_short(value[form])}: must be {_ALLOWED[form]}")
    name = next((value[name] for name in NAMES if name in value), number)
    return Prompt(str(name), str(value.get("category", "all")), **{form: value[form]})


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"role", "content"} and value["role"] in ROLES and _is_text(value["content"])


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "prompt": _is_text,
    "messages": lambda value: isinstance(value, list) and bool(value) and all(map(_is_message, value)),
    "turns": lambda value: isinstance(value, list) and bool(value) and all(map(_is_text, value)),
}
_ALLOWED = {
    "prompt": "a text that is not empty",
    "messages": f'a list of {{"role": {" | ".join(ROLES)}, "content": a text}}',
    "turns": "a list of texts that are not empty",
}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
