"""`redraft bench cache`, from the command line to its table, its JSON and its figure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from redraft import registry
from redraft.bench.tasks import FACTS, NEEDLE, OFTENEST, PAIRS, SHOTS
from redraft.engine.curves import Curves
from tests.cli.conftest import Ran
from tests.cli.test_main import LIGHT

TEXT = " ".join(f"line {i} of {i * i}" for i in range(300))


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(registry.METHODS["keep"], "newest", "tests.bench.test_cache:Newest")
    path = tmp_path / "books" / "a.txt"
    path.parent.mkdir()
    path.write_text(TEXT)
    return str(path)


def test_help_names_the_verb_and_imports_nothing_heavy(redraft: Callable[..., Ran]) -> None:
    code, out, _ = redraft("bench", "--help")
    assert code == 0 and " cache " in out
    done = subprocess.run([sys.executable, "-c", LIGHT, "bench", "cache", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--budget" in done.stdout, done.stderr


def test_all_of_it(redraft: Callable[..., Ran], tiny: str, texts: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found, drawn = tmp_path / "found.json", tmp_path / "drawn.png"
    small = ["--limit", "2", "--length", "250", "--turns", "2", "--given", "8", "--memory", "300", "--dtype", "float64"]
    policy = ["--policy", "keep=newest:budget={tokens}", "--budget", "100", "--budget", "32"]
    code, out, err = redraft(
        "bench", "cache", tiny, "--texts", texts, *small, *policy, "--json", str(found), "--plot", str(drawn), "--save"
    )
    assert code == 0, err
    assert "books: perplexity; 2 texts of up to 248 tokens" in out and "at 100 % the same scores as the whole cache: newest" in out
    assert drawn.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and len(drawn.read_bytes()) > 20_000
    document = json.loads(found.read_text())
    assert [task["task"] for task in document["tasks"]] == ["books", *NEEDLE, *FACTS, *PAIRS, *SHOTS, *OFTENEST]
    assert document["markdown"].count("| newest |") == 2
    kept = Curves.load(Path(re.search(r"kept in (\S+)", err)[1]))  # type: ignore[index]
    assert 240 < kept.tokens <= 250 and [(one.policy, one.budget) for one in kept.curves] == [(policy[1], 100), (policy[1], 32)]
    assert {*kept.curves[0].loss} == {task["task"] for task in document["tasks"]}
    for task in document["tasks"]:
        whole, same, tight = task["rows"]
        assert (whole["policy"], same["budget"], tight["budget"]) == ("full", 100, 32)
        assert same["logprob"] == whole["logprob"] and tight["logprob"] != whole["logprob"]
        assert tight["params"] == {"keep": f"newest:budget={tight['tokens']}"}
    whole, _, newest = document["memory"]
    assert newest["peak_bytes"] < whole["peak_bytes"] and document["settings"]["texts"] == [texts]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--policy", "keep=newes"], "did you mean 'newest'?"),
        (["--policy", "newest"], "must be seam=name:option=value"),
        (["--budget", "0"], "budget = 0: percent above 0"),
        (["--limit", "1"], "limit = 1: must be 2 or more"),
        (["--length", "900"], "length = 900: the context leaves 255"),
        (["--memory", "9"], "memory = 9: must be 0 or more than 192"),
        (["--texts", "none.txt"], "texts = none.txt: cannot be read"),
        (["--json", "none/a.json"], "there is no folder none"),
        (["--plot", "none/a.png"], "plot = none/a.png: there is no folder none"),
        (["--plot", "a.gif"], "plot = a.gif: a name that ends in .png, .svg or .pdf is needed"),
        (["--policy", "keep=newest:budget={tokens}", "--budget", "1", "--length", "200", "--turns", "1"], "newest:budget=2: must be 32"),
    ],
)
def test_an_error_is_one_line(redraft: Callable[..., Ran], tiny: str, texts: str, arguments: list[str], expected: str) -> None:
    given = arguments if "--texts" in arguments else [*arguments, "--texts", texts]
    code, out, err = redraft("bench", "cache", tiny, *given)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and expected in err, err
