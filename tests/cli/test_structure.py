"""What the text must be: --json-schema, --regex, --choice and --grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["a"],
    "additionalProperties": False,
}


def test_each_form(redraft: Callable[..., Ran], tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "a.gbnf"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text('root ::= "<" [xy]{2} ">"\n')
    forms = {
        ("--json-schema", str(schema)): r'\{"a": \d\d?\}',
        ("--json-schema", json.dumps(SCHEMA)): r'\{"a": \d\d?\}',
        ("--regex", "[ab]{3}!"): "[ab]{3}!",
        ("--choice", "one", "--choice", "two words"): "one|two words",
        ("--grammar", str(grammar)): "<[xy]{2}>",
        ("--grammar", 'start: "p" | "q"'): "[pq]",
        ("--grammar", '?start: "p" | "q"'): "[pq]",
    }
    for form, pattern in forms.items():
        code, out, err = redraft("generate", "--raw", "-p", "x = ", "--max-tokens", "30", "--seed", "1", *form)
        assert code == 0 and re.fullmatch(pattern, out.strip()), (form, out, err)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (("--json-schema", "missing.json"), "--json-schema = 'missing.json': cannot be read: No such file"),
        (("--json-schema", '{"type": 3}'), "--json-schema: #/type"),
        (("--json-schema", '{"type": '), "which is no JSON: Expecting value: line 1 column 10"),
        (("--grammar", "root.gbnf"), "--grammar = 'root.gbnf': cannot be read: No such file"),
        (("--regex", "a", "--choice", "b"), "--regex and --choice exclude each other"),
        (("--regex", "("), "--regex = '(': "),
    ],
)
def test_errors_are_one_line(redraft: Callable[..., Ran], form: tuple[str, ...], said: str) -> None:
    code, out, err = redraft("generate", "-p", "x", "--max-tokens", "3", *form)
    assert code == 2 and not out and said in " ".join(err.split())


def test_compare_takes_a_form(redraft: Callable[..., Ran]) -> None:
    arguments = ("--draft", "suffix", "--limit", "1", "--max-tokens", "12", "--rounds", "1", "--regex", "[a-z ]{8,30}")
    code, out, err = redraft("compare", *arguments)
    assert code == 0, err
    assert "suffix" in out
