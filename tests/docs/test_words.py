"""Names and prose use the terms of docs/glossary.md, never the words that they replaced."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REVERSED = ("bals", "wal", "dlot", "draeh", "thguos", "wolloh", "seodnu", "niwt", "wodahs")  # this file is read too
BANNED = {word[::-1] for word in REVERSED}
FORMS = ("{}", "{}s", "a {}.", "# {}: b", "kv_{}_size", "{}_of", "Kv{title}Size", "kv{title}s", "KV_{upper}", 'f"\\n{}"')
SUFFIXES = {".py", ".cpp", ".h", ".txt", ".md", ""}
PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # a word of prose, or a part of snake_case and CamelCase
ESCAPE = re.compile(r"\\[abfnrtv]")  # of string literals


def banned(text: str) -> set[str]:
    """The banned words of a text, singular or plural, as words and as parts of names."""
    words = {part.lower() for part in PART.findall(ESCAPE.sub(" ", text))}
    return BANNED & (words | {word.removesuffix("s") for word in words})


def files() -> Iterator[Path]:
    yield ROOT / "README.md"
    for folder in ("redraft", "redraft_train", "scripts", "tests", "docs"):
        yield from (path for path in sorted((ROOT / folder).rglob("*")) if path.is_file() and path.suffix in SUFFIXES)


def test_no_file_has_a_banned_word() -> None:
    found = {str(path.relative_to(ROOT)): banned(path.read_text(encoding="utf-8")) for path in files()}
    assert {name: words for name, words in found.items() if words} == {}


def test_the_files_are_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in files()}
    own = str(Path(__file__).relative_to(ROOT))
    assert {"README.md", "docs/serving.md", "redraft/ops/cpu/api.cpp", "redraft/engine/engine.py", "scripts/prove", own} <= names


@pytest.mark.parametrize("word", sorted(BANNED))
@pytest.mark.parametrize("form", FORMS)
def test_a_banned_word_is_found_in_every_form(form: str, word: str) -> None:
    assert banned(form.format(word, title=word.title(), upper=word.upper())) == {word}


@pytest.mark.parametrize("text", ["flaw", "lawn", "stole", "overshadowing", "untold", "'a\\told'", "Lawson"])
def test_other_words_pass(text: str) -> None:
    assert banned(text) == set()
