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
import os, sys
import numpy  # once for all: the processes below begin with it, and with the backend
from redraft import registry
from tests.arrays import BACKEND
registry.backend(BACKEND)

def without(name):
    target = registry.METHODS["draft"].pop(name)
    sys.modules[target.split(":")[0]] = None  # as if the file were gone: importing it raises
    import redraft.engine.engine, redraft.llm
    from tests.contracts.identity import Condition, check
    check(Condition("none" if name != "none" else "random"))

for name in sys.argv[1:]:
    if not os.fork():
        without(name)
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_the_engine_does_without_any_one_drafter() -> None:
    names = list(registry.METHODS["draft"])
    done = subprocess.run([sys.executable, "-c", WITHOUT, *names], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name} 0" for name in names], done.stderr
