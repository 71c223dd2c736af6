"""`redraft train`: the whole verb, continued, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from redraft import LLM
from redraft.bench import compare as bench
from redraft.bench.prompts import Prompt
from redraft.cli import main
from redraft.errors import InvalidInput
from redraft.models.trained import FILE, Trained
from redraft_train import report
from redraft_train.train import Trainer
from redraft_train.verbs import TRAIN
from tests.redraft_train.conftest import LINES

SHORT = ["--texts", "5", "--max-tokens", "12", "--kept", "300", "--steps", "3", "--no-compare", "--threads", "1"]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The verb is there also if the checkout was installed before it was."""
    monkeypatch.setattr(main, "others", lambda: {"train": TRAIN})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_verb_is_an_entry_point() -> None:
    groups = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    assert groups == {main.VERBS_OF_OTHERS: {"train": "redraft_train.verbs:TRAIN"}}
    assert EntryPoint("train", groups[main.VERBS_OF_OTHERS]["train"], main.VERBS_OF_OTHERS).load() == TRAIN


def train(prompts: Path, out: Path, *more: str) -> int:
    return main.run(["train", "embedded", "--head", "medusa:heads=2", "--prompts", str(prompts), "--out", str(out), *SHORT, *more])


def same(one: Path, other: Path) -> bool:
    """Whether two heads have the same numbers."""
    first, second = (load_file(folder / FILE) for folder in (one, other))
    return first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)


def test_the_verb_from_prompts_to_a_head(prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(prompt_file, tmp_path / "head") == 0
    shown = capsys.readouterr()
    assert shown.out == f"medusa:path={tmp_path / 'head'}\n"
    assert [line.split()[0] for line in shown.err.splitlines()] == ["texts", "states", "training"]
    assert all(len(line) <= 80 for line in shown.err.splitlines())
    assert sorted(path.name for path in (tmp_path / "head").iterdir()) == ["README.md", "data", FILE]
    made = Trained.load(tmp_path / "head", "medusa")
    made.check(LLM("embedded").runner, tmp_path)
    with pytest.raises(InvalidInput, match=r"medusa: .* was made for the model with hash"):
        made.check(LLM("embedded-draft").runner, tmp_path)
    assert made.about["heads"] == 2 and 300 <= len(made.arrays["kept"]) < 400
    card = (tmp_path / "head" / "README.md").read_text()
    for part in (
        "5 answers of the model, 1 of them held out",
        "in 3 steps.",
        "--kept 300 --max-tokens 12 --seed 0 --steps 3 --texts 5",
        "| 2 | ",
    ):
        assert part in card
    before = (tmp_path / "head" / FILE).read_bytes()
    assert train(prompt_file, tmp_path / "head") == 2
    assert "has a trained head; remove it or name another folder" in capsys.readouterr().err
    assert (tmp_path / "head" / FILE).read_bytes() == before


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(
    prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(prompt_file, tmp_path / "whole") == 0
    update, calls = Trainer._update, []

    def stopped(self: Trainer, *given: object) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_update", stopped)
    monkeypatch.setattr("redraft_train.train.SAVE_EVERY", -1.0)
    assert train(prompt_file, tmp_path / "parts") == 130
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["data", "work"]
    texts = (tmp_path / "parts" / "data" / "texts.jsonl").read_bytes()
    assert train(prompt_file, tmp_path / "parts") == 0
    assert len(calls) == 4  # two steps were kept
    assert (tmp_path / "parts" / "data" / "texts.jsonl").read_bytes() == texts
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert "states" in capsys.readouterr().err


def test_heads_share_texts_and_states(prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    for name in ("one", "two"):
        assert train(prompt_file, tmp_path / name, "--data", str(data)) == 0
    assert f"states    {capsys.readouterr().err.partition('states    ')[2].split()[0]}" and not (tmp_path / "two" / "data").exists()
    assert same(tmp_path / "one", tmp_path / "two")
    assert train(prompt_file, tmp_path / "three", "--data", str(data), "--seed", "1") == 2
    assert f"--data = {data}: its texts are of another seed; name another folder, or remove it" in capsys.readouterr().err
    assert not (tmp_path / "three" / FILE).exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--head", "medusas"], "no head 'medusas': did you mean 'medusa'"),
        (["--head", "medusa:wings=2"], "wings"),
        (["--head", "medusa:heads=0"], "heads=0"),
        (["--budget", "soon"], "--budget = 'soon': a time such as 1h, 40m or 1h30m is needed"),
        (["--prompts", "missing.txt"], "--prompts = missing.txt: there is no such file"),
        (["--prompts", "."], "--prompts = .: is a folder"),
        (["--steps", "0"], "--steps = 0: must be 1 or more"),
        (["--texts", "1"], "--texts = 1: must be 2 or more"),
        (["--kept", "0"], "--kept = 0: must be 1 or more"),
        (["--rate", "2"], "--rate = 2.0: must be above 0 and below 1"),
        (["--data", __file__], "is a file; a folder is needed"),
    ],
)
def test_what_is_refused(given: list[str], message: str, prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(prompt_file, tmp_path / "head", *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize("lacking", ["head", "prompts", "out"])
def test_what_is_needed(lacking: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"head": "medusa", "prompts": "p.txt", "out": "x"}
    words = [word for name, value in given.items() if name != lacking for word in (f"--{name}", value)]
    assert main.run(["train", "embedded", *words]) == 2
    assert capsys.readouterr().err == f"error: --{lacking}: is needed\n"


def test_a_bad_file_of_prompts_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n')
    assert train(tmp_path / "bad.jsonl", tmp_path / "head") == 2
    assert "bad.jsonl:1: prompt = 3: must be a text that is not empty" in capsys.readouterr().err
    assert not (tmp_path / "head").exists()


def test_a_small_model_is_a_folder_that_drafts(prompt_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "draft"
    assert train(prompt_file, out, "--head", "draft:width=64,layers=1,group=1") == 0
    assert capsys.readouterr().out == f"draft-model:model={out}\n"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    llm = LLM("embedded", draft=f"draft-model:model={out}", cache_memory=1 << 25)
    drafted, plain = (one.generate("def f(", temperature=0, max_tokens=12)[0].outputs[0] for one in (llm, llm.sibling(draft="none")))
    assert drafted.token_ids == plain.token_ids and drafted.stats.drafted > 0 and not drafted.stats.fault
    assert train(prompt_file, out, "--head", "draft") == 2


def test_without_pytorch_the_extra_is_named(
    prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("redraft_train.cli.importlib.util.find_spec", lambda name: None)
    assert train(prompt_file, tmp_path / "head") == 1
    assert capsys.readouterr().err == "error: redraft train needs PyTorch, which is not installed: pip install 'redraft[train]'\n"


HELP = """
import sys
from redraft.cli import main
from redraft_train.verbs import TRAIN
main.others = lambda: {"train": TRAIN}
assert main.run(sys.argv[1:]) == 0
heavy = {"torch", "numpy", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", HELP, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Train a drafter for a model" in done.stdout


def test_at_the_end_the_head_is_compared_on_held_out_prompts(
    prompt_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "TOKENS", 4)
    monkeypatch.setattr(report, "ROUNDS", 1)
    monkeypatch.setenv("COLUMNS", "80")
    seen: list[str] = []
    compare = bench.compare

    def compared(llm: LLM, options: bench.CompareOptions, prompts: list[Prompt], *rest: object) -> bench.Comparison:
        seen.extend(prompt.prompt or "" for prompt in prompts)
        return compare(llm, options, prompts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(bench, "compare", compared)
    assert train(prompt_file, tmp_path / "head", "--compare") == 0
    shown = capsys.readouterr().out
    for line in ("none", "auto", f"medusa:path={tmp_path / 'head'}", f"auto:head={tmp_path / 'head'}"):
        assert any(one.strip().startswith(line) for one in shown.splitlines()), line
    assert shown.splitlines()[-1] == f"medusa:path={tmp_path / 'head'}"
    assert len(seen) == 1 and f"Held out, 1 of them: {LINES.index(seen[0]) + 1}." in (tmp_path / "head" / "README.md").read_text()
