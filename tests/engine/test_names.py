"""The engine names no method, and works without any one of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import redraft.engine
from redraft import registry

SOURCES = sorted(Path(redraft.engine.__path__[0]).glob("*.py"))
NAMES = {name for methods in registry.METHODS.values() for name in methods} | set(registry.BACKENDS)
MODULES = {target.split(":")[0] for methods in [*registry.METHODS.values(), registry.BACKENDS] for target in methods.values()}


def named(source: str) -> list[str]:
    """Registered names and modules of methods that a source mentions."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(text)) if text in NAMES:
                found.append(text)
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name in MODULES]
            case ast.ImportFrom(module=str(module), names=names):
                found += [m for m in [module, *(f"{module}.{alias.name}" for alias in names)] if m in MODULES]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_engine_names_no_method(path: Path) -> None:
    assert named(path.read_text()) == []


def test_the_search_would_find_one() -> None:
    assert len(SOURCES) > 2
    assert named("from redraft.draft.copyspec import CopySpec") == ["redraft.draft.copyspec"]
    assert named("from redraft.draft import copyspec") == ["redraft.draft.copyspec"]
    assert named("import redraft.verify.coupled") == ["redraft.verify.coupled"]
    assert named("if name == 'token-recycling': pass") == ["token-recycling"]


WITHOUT = """
import sys
from redraft import registry
target = registry.METHODS["draft"].pop({name!r})
sys.modules[target.split(":")[0]] = None  # as if the file were gone: importing it raises
import redraft.engine.engine, redraft.llm
from tests.contracts.identity import Condition, check
{run}
"""


@pytest.mark.parametrize("name", list(registry.METHODS["draft"]))
def test_the_engine_does_without_any_one_drafter(name: str) -> None:
    run = 'check(Condition("none"))' if name != "none" else 'check(Condition("random"))'
    done = subprocess.run([sys.executable, "-c", WITHOUT.format(name=name, run=run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
