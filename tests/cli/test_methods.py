from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from redraft import registry
from redraft.draft import copyspec
from tests.cli.conftest import Ran

REGISTERED = [(name, seam) for seam, methods in registry.METHODS.items() for name in methods]


def test_the_list_has_every_method_on_a_line_of_its_own(redraft: Callable[..., Ran]) -> None:
    code, out, _ = redraft("methods")
    lines = out.splitlines()
    found, seam = [], ""
    for line in lines[:-1]:
        if line and not line.startswith(" "):
            seam = line.split()[0]
        elif line:
            name, does, when = re.fullmatch(r"  (\S+) +(\S[^;]*); (\S.*)", line).groups()  # type: ignore[union-attr]
            found.append((name, seam))
            assert does and when
    assert (code, found) == (0, REGISTERED)
    assert "redraft methods NAME" in lines[-1]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", sorted({name for name, _ in REGISTERED}))
@pytest.mark.parametrize("columns", ["80", None])
def test_every_method_fits_80_columns(redraft: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, name: str, columns: str | None) -> None:
    if columns is None:
        monkeypatch.delenv("COLUMNS")
    else:
        monkeypatch.setenv("COLUMNS", columns)
    _, out, _ = redraft("methods", name)
    assert [line for line in out.splitlines() if len(line) > 80] == []


def test_json(redraft: Callable[..., Ran]) -> None:
    found = json.loads(redraft("methods", "--json")[1])
    assert [(one["name"], one["seam"]) for one in found] == REGISTERED
    for one in found:
        assert {"name", "seam", "guarantee", "needs", "paper", "summary", "options"} <= set(one)
    assert next(one["options"] for one in found if one["name"] == "token-recycling") == [
        {"name": "k", "type": "int", "default": 8},
        {"name": "path", "type": "Path | None", "default": None},
    ]


def test_one_method_tells_its_options_and_docstring(redraft: Callable[..., Ran]) -> None:
    code, out, _ = redraft("methods", "copyspec")
    assert code == 0
    assert "copyspec:gamma=...  int, default 3\n" in out
    assert copyspec.__doc__ is not None
    assert copyspec.__doc__.strip() in out
    assert "no options" in redraft("methods", "none")[1]


def test_the_page_is_current(redraft: Callable[..., Ran]) -> None:
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    assert page.read_text() == redraft("methods", "--markdown")[1], "run: redraft methods --markdown > docs/methods.md"
