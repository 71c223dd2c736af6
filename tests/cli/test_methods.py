from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from redraft import registry
from redraft.draft import copyspec
from tests.cli.conftest import Ran

REGISTERED = [(name, seam) for seam, methods in registry.METHODS.items() for name in methods]


def test_the_table_has_every_method(redraft: Callable[..., Ran]) -> None:
    code, out, _ = redraft("methods")
    head, *rows = (line for line in out.splitlines() if not line.startswith(" "))  # long cells go on in the next line
    assert (code, head.split()) == (0, ["name", "seam", "guarantee", "needs", "paper"])
    assert [tuple(row.split()[:2]) for row in rows] == REGISTERED
    assert "arXiv 2408.08696" in out


def test_json(redraft: Callable[..., Ran]) -> None:
    found = json.loads(redraft("methods", "--json")[1])
    assert [(one["name"], one["seam"]) for one in found] == REGISTERED
    for one in found:
        assert {"name", "seam", "guarantee", "needs", "paper", "options"} <= set(one)
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
