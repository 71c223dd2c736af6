"""The pages tell the truth: what they print is printed again, what they show runs."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from redraft import LLM, SamplingParams, registry
from redraft.cli.main import app

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


def test_one_step_is_what_the_engine_does() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "one_step.py"))["page"]()
    assert made == (ROOT / "docs" / "one-step.md").read_text(encoding="utf-8"), "run: python docs/one_step.py"


DRAFTERS = """
from dataclasses import dataclass
from typing import ClassVar
from redraft.card import Card, Guarantee
from redraft.core.tree import Kind, TokenTree
from redraft.draft.drafter import Stateless
from redraft.draft.second import SecondModel

"""


@pytest.mark.parametrize(("name", "options"), [("RepeatLast", ":length=3"), ("TwoLevels", "")])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_the_drafters_of_adding_run(name: str, options: str, temperature: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (drafter,) = (code for code in blocks("docs/adding.md", "python") if f"class {name}" in code)
    (tmp_path / f"adding_{name.lower()}.py").write_text(DRAFTERS + drafter)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(registry.METHODS["draft"], "new", f"adding_{name.lower()}:{name}")
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=24)
    llm = LLM("embedded", dtype="float64", draft=f"new{options}", cache_memory=1 << 26)
    drafted = llm.generate("a = [1, 1, 1, 1, 1, 1, 1,", params)[0].outputs[0]
    plain = llm.sibling(draft="none").generate("a = [1, 1, 1, 1, 1, 1, 1,", params)[0].outputs[0]
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats.drafted > 0 and not drafted.stats.fault


def test_the_commands_of_the_readme_exist() -> None:
    """Every `redraft verb ... --option` of the README is one that the command line knows."""
    lines = [line for block in blocks("README.md", "sh") for line in block.splitlines() if line.startswith("redraft ")]
    assert lines
    for line in lines:
        verb, *rest = shlex.split(line, comments=True)[1:]
        verbs = [verb, rest[0]] if verb == "bench" else [verb]
        shown = CliRunner().invoke(app, [*verbs, "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
        assert shown.exit_code == 0, line
        for option in (word for word in rest if word.startswith("--")):
            assert option in shown.output, f"{line}: no {option}"


def test_every_python_block_of_the_readme_runs() -> None:
    for code in blocks("README.md", "python"):
        if "base_url" not in code:  # those that ask a server run in tests/serve/test_docs.py
            exec(compile(code, "README.md", "exec"), {})


def test_the_file_tree_of_the_readme_is_whole() -> None:
    """Every Python file of the package's folders is named in the tree, and nothing that is not there."""
    (tree,) = blocks("README.md", "text")
    named = set(re.findall(r"[\w-]+\.py\b", tree))
    here = {path.name for path in (ROOT / "redraft").rglob("*.py") if path.name not in ("__init__.py", "__main__.py")}
    assert here - named == set()
    assert named - here - {path.name for path in (ROOT / "train").glob("*.py")} == set()


def test_the_diffs_are_those_of_the_files() -> None:
    """docs/adding.md shows what adding a method took, as the files have it now."""
    made = runpy.run_path(str(ROOT / "docs" / "adding_diffs.py"))
    assert made["page"]() == (ROOT / "docs" / "adding.md").read_text(encoding="utf-8"), "run: python docs/adding_diffs.py"
