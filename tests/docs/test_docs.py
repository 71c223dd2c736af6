"""The pages are correct: their output is reproduced, their commands parse, their code runs, their lists are complete."""

from __future__ import annotations

import re
import runpy
import shlex
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from redraft import LLM, SamplingParams, registry
from redraft.bench.shapes import SHAPES
from redraft.cli.main import USAGE_ERROR, app

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


@pytest.mark.torch
def test_one_step_is_what_the_engine_does() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "one_step.py"))["page"]()
    assert made == (ROOT / "docs" / "one-step.md").read_text(encoding="utf-8"), "run: python scripts/one_step.py"


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


SEAMS = {"--draft": "draft", "--verify": "verify", "--keep": "keep", "--codec": "codec", "--read": "read", "--quant": "quant"}
PLACEHOLDER = re.compile(r"(tuned=)?\./my-[a-z-]+(\.jsonl?|\.html|\.yaml)?")  # what a reader replaces
TARGETS = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


def commands(page: str) -> list[list[str]]:
    return [words for block in blocks(page, "sh") for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters of a `redraft` command line, as the real parser reads them; it raises what a user would see."""
    command: Any = get_command(app)
    context = command.make_context("redraft", words)
    while hasattr(command, "commands"):
        left = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, left)
        context = command.make_context(name, rest, parent=context)
    return dict(context.params)


@pytest.mark.parametrize("words", commands("README.md"), ids=" ".join)
def test_a_command_of_the_readme_works_in_a_fresh_clone(words: list[str]) -> None:
    if words[:2] == ["redraft", "train"] and not entry_points(group="redraft.verbs"):
        pytest.skip("redraft is not installed here, and its second package has this verb")
    if words[0] == "redraft":
        values = parsed(words[1:])
        model = values.get("model")
        assert model in (None, "embedded", *SHAPES) or PLACEHOLDER.fullmatch(model), f"{model} is not in a fresh clone"
        for option, text in pairwise(words):
            if option in SEAMS:
                name, _ = registry.parse(text)
                registry.method(SEAMS[option], name)
            assert "/" not in text or text.startswith("http") or PLACEHOLDER.fullmatch(text), f"{text} is not in a fresh clone"
    elif words[0] == "make":
        assert words[1] in TARGETS
    elif words[0] == "scripts/prove":
        assert (ROOT / "scripts" / "proofs" / f"{words[1].replace('-', '_')}.py").exists()
    else:
        assert words == ["pip", "install", "."]


def test_a_command_that_does_not_exist_is_found() -> None:
    with pytest.raises(USAGE_ERROR, match="No such option"):
        parsed(["generate", "embedded", "--no-such-option"])
    with pytest.raises(USAGE_ERROR, match="No such command"):
        parsed(["no-such-verb"])


def test_the_readme_is_short_and_begins_with_use() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150
    assert lines.index("```sh") < 10


def test_links_of_the_readme_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_python_block_of_the_readme_runs() -> None:
    for code in blocks("README.md", "python"):
        if "base_url" not in code:  # those that ask a server run in tests/serve/test_docs.py
            exec(compile(code, "README.md", "exec"), {})


def test_examples_of_sampling() -> None:
    names: dict[str, Any] = {}
    for code in blocks("docs/sampling.md", "python"):
        exec(compile(code, "sampling.md", "exec"), names)
    for words in commands("docs/sampling.md"):
        assert parsed(words[1:])["prompt"]


def test_the_list_of_files_is_whole() -> None:
    """Every Python file of the package's folders is in docs/files.md, and nothing that does not exist."""
    (tree,) = blocks("docs/files.md", "text")
    named = set(re.findall(r"[\w-]+\.py\b", tree))
    files = (path for folder in ("redraft", "redraft_train") for path in (ROOT / folder).rglob("*.py"))
    here = {path.name for path in files if path.name not in ("__init__.py", "__main__.py")}
    assert here - named == set()
    others = {path.name for path in (ROOT / "scripts").glob("*.py")}
    assert named - here - others == set()
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(re.findall(r"[\w-]+\.md", tree))


def test_the_glossary_has_each_term_once() -> None:
    terms = re.findall(r"^\| (?!term|option|---)(.+?) \|", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.M)
    assert len(terms) > 50
    assert sorted(set(terms)) == sorted(terms)


def test_the_folders_of_the_glossary_exist() -> None:
    folders = re.findall(r"^\| `\w+` \| [\w -]+ \| `([\w/]+/)` \|", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.M)
    assert len(folders) == len(registry.METHODS) - 2  # all seams but schedulers and routers
    assert [folder for folder in folders if not (ROOT / "redraft" / folder).is_dir()] == []


def test_the_folders_of_the_readme_are_those_of_the_package() -> None:
    (tree,) = blocks("README.md", "text")
    named = re.findall(r"^  (\w+)/", tree, re.M)
    folders = [path.name for path in (ROOT / "redraft").iterdir() if path.is_dir() and not path.name.startswith("_")]
    assert sorted(named) == sorted(folders)


def test_the_diffs_are_those_of_the_files() -> None:
    """docs/adding.md shows what adding a method took, as the files have it now."""
    made = runpy.run_path(str(ROOT / "scripts" / "adding_diffs.py"))
    assert made["page"]() == (ROOT / "docs" / "adding.md").read_text(encoding="utf-8"), "run: python scripts/adding_diffs.py"
