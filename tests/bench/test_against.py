"""`redraft compare --against`: whole texts of several engines, in turns. Only durations that a fake engine makes up are asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from redraft import registry
from redraft.bench import against as bench
from redraft.bench.against import Against, Row
from redraft.bench.compare import CompareOptions
from redraft.bench.decode import Engine, Package, Spread
from redraft.bench.peers.peer import ended
from redraft.bench.prompts import Prompt
from redraft.config import SamplingParams
from redraft.errors import InvalidInput, PromptTooLong, RedraftError, UnknownMethod
from tests.bench import fakes
from tests.models import tiny

Ran = tuple[int, str, str]  # exit code, stdout, stderr
HERE = "tests.bench.workers"
PROMPTS = [
    Prompt("a", "all", prompt="w10 w20 w30"),
    Prompt("b", "all", prompt="w9 w11 w12 w13"),
    Prompt("c", "all", turns=["w5 w6", "w7"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.checkpoint(tmp_path_factory.mktemp("against") / "tiny")


def options(*drafts: str, rounds: int = 2, **params: Any) -> CompareOptions:
    return CompareOptions(drafts or ("auto",), SamplingParams(**{"temperature": 0, "max_tokens": 12, **params}), rounds)


def shown(found: bench.Comparison, chosen: CompareOptions, against: Against, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        bench.show(console, found, chosen, against)
    return captured.get()


def words(text: str) -> str:
    return " ".join(text.split())


def test_engines_take_turns_and_who_fails_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "OWN", f"{HERE}:Writes")
    writes = Package(f"{HERE}:Writes", "json", "nothing")
    monkeypatch.setattr(
        bench,
        "PEERS",
        {
            "writes": (writes, ("plain", "odd", "broken")),
            "faints": (writes._replace(target=f"{HERE}:Faints"), ("plain", "odd")),
            "refuses": (writes._replace(target=f"{HERE}:Refuses"), ("plain",)),
            "absent": (writes._replace(modules="json no_such_module", pip="absent-package"), ("plain",)),
        },
    )
    chosen, against = options(), Against(("writes", "faints", "refuses", "absent"), engine={"threads": 1, "quant": "int8"})
    seen: list[str] = []
    found = bench.compare(str(folder), chosen, against, PROMPTS, seen.append)
    rows = {(row.engine.name, row.mode): row for row in found.rows}
    assert {name: row.lost for name, row in rows.items()} == {
        ("redraft", "plain"): None,
        ("redraft", "auto"): None,
        ("writes", "plain"): None,
        ("writes", "odd"): None,
        ("writes", "broken"): "ValueError: no such mode today",
        ("faints", "plain"): "ended by SIGKILL: last words",
        ("faints", "odd"): "ended by SIGKILL: last words",
        ("refuses", "plain"): "not loaded: RedraftError: cannot load this",
    }
    assert found.best is rows["redraft", "auto"]
    assert found.ratio(rows["writes", "plain"]) == Spread(2, 2, 2) and found.ratio(rows["writes", "odd"]) == Spread(0.5, 0.5, 0.5)
    assert [found.equal(rows["writes", mode]) for mode in ("plain", "odd")] == [3, 2]
    assert [len(one["tokens"]) for one in rows["writes", "plain"].runs[0]] == [3, 4, 2], "one turn, and nothing around a text"
    assert {engine.facts["threads"] for engine in found.engines if engine.facts} == {"1"}
    first = [what.partition(": ")[2] for what in seen if what.startswith("round")][:: len(found.rows)]
    assert len(first) == 6 and len(set(first)) > 1, "another one begins with each prompt"
    text = shown(found, chosen, against)
    assert max(map(len, text.splitlines())) <= 80
    for reported in (
        "redraft 7, int8",
        "absent is not installed: pip install absent-package",
        "refuses left: not loaded: RedraftError: cannot load this",
        "faints left: ended by SIGKILL: last words",
        "writes, broken left: ValueError: no such mode today",
        "redraft, auto: 0.50x (0.50-0.50) the speed of the fastest peer, writes, odd",
        "auto: fake auto",
        "only the first turn of each prompt is run",
    ):
        assert reported in words(text)
    assert words("odd 4.0 0.50x 0.50-0.50 2/3") in words(text)
    document = json.loads(json.dumps(bench.document(found, chosen, against, "here"), allow_nan=False))
    assert document["missing"] == {"absent": "absent-package"} and document["best"] == "auto" and document["settings"]["rounds"] == 2
    odd = document["rows"][3]
    assert (odd["mode"], odd["same_text"], odd["prompts"]) == ("odd", 2, 3)
    assert odd["redraft_best_over_it"] == {"median": 0.5, "low": 0.5, "high": 0.5} and odd["tokens_per_second"]["median"] == 4
    assert odd["rounds"][0][1]["tokens"] == [0] and document["rows"][5]["tokens_per_second"] is None


@pytest.mark.torch
def test_redraft_and_transformers_say_the_same_in_every_mode(folder: Path, tmp_path: Path, redraft: Callable[..., Ran]) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    prompts.write_text("".join(json.dumps({"id": p.id, "prompt": p.prompt}) + "\n" for p in PROMPTS[:2]))
    given = f"--prompts {prompts} --dtype float32 --threads 1 --max-tokens 9 --rounds 1 --json {out} --ignore-eos"
    code, text, err = redraft("compare", str(folder), *given.split(), "--against", "transformers", "--assistant", str(folder))
    assert code == 0, err
    found = json.loads(out.read_text())
    assert [(row["engine"], row["mode"], row["lost"], row["same_text"]) for row in found["rows"]] == [
        ("redraft", "plain", None, 2),
        ("redraft", "auto", None, 2),
        ("transformers", "plain", None, 2),
        ("transformers", "prompt lookup", None, 2),
        ("transformers", "assistant", None, 2),
    ]
    assert all(len(one["tokens"]) == 9 for row in found["rows"] for one in row["rounds"][0])
    assert len({token for one in found["rows"][0]["rounds"][0] for token in one["tokens"]}) > 1  # a repeated token would hide differences
    assert found["engines"][1]["facts"]["torch_threads"] == 1 and found["settings"]["assistant"] == str(folder)
    assert "transformers" in text and f"written to {out}" in err.replace("\n", "")


@pytest.mark.torch
def test_a_text_ends_with_the_first_stop_token_in_every_engine(folder: Path) -> None:
    whole = bench.compare(str(folder), options(rounds=1, ignore_eos=True), Against(()), PROMPTS[:1])
    tokens = whole.base.runs[0][0]["tokens"]
    stop = tokens[4]
    short = bench.compare(str(folder), options(rounds=1, stop_token_ids=(stop,)), Against(("transformers",)), PROMPTS[:1])
    expected = tokens[: tokens.index(stop) + 1]
    assert [row.runs[0][0]["tokens"] for row in short.rows] == [expected] * 4
    assert ended(iter(tokens), (stop,), 99) == expected and ended(tokens, (), 3) == tokens[:3]


def test_prompts_that_do_not_fit_are_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "OWN", f"{HERE}:Writes")
    against = Against((), engine={"max_model_len": 16})
    found = bench.compare(str(folder), options(), against, PROMPTS)
    assert found.left_out == ["b"] and "left out, longer than the context with the new tokens: b" in words(shown(found, options(), against))
    with pytest.raises(PromptTooLong, match="none of the 3 prompts fits the context of 12 with 12 new tokens"):
        bench.compare(str(folder), options(), Against((), engine={"max_model_len": 12}), PROMPTS)


def test_without_redraft_there_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "OWN", f"{HERE}:Refuses")
    with pytest.raises(RedraftError, match="redraft does not run: not loaded: RedraftError: cannot load this"):
        bench.compare(str(folder), options(), Against(()), PROMPTS)


def test_ctrl_c_keeps_the_rounds_that_all_have_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "OWN", f"{HERE}:Writes")
    against, chosen = Against(()), options(rounds=9)

    def stop(what: str) -> None:
        if what.startswith("round 3/"):
            raise KeyboardInterrupt

    found = bench.compare(str(folder), chosen, against, PROMPTS, stop)
    assert found.stopped and [len(row.runs) for row in found.rows] == [2, 2] and len(found.prompts) == 3
    assert "stopped by Ctrl-C: of 9 rounds 2 of 3 prompts are shown" in words(shown(found, chosen, against))


@pytest.mark.parametrize("draft", [*registry.METHODS["draft"], "union:parts=copyspec+token-recycling"])
def test_the_table_fits_80_columns_with_every_name_whole(draft: str) -> None:
    own, peer = (
        Engine("redraft", "", {"quant": "int4"}, {"version": "0.1.0"}),
        Engine("openvino", "", {}, {"version": "2026.4.1.0-3408-ab01d1"}),
    )
    rows = [Row(own, "plain"), Row(own, draft), Row(peer, "plain"), Row(peer, "prompt lookup")]
    for i, row in enumerate(rows):
        row.runs = [[{"seconds": 0.0001 * (1 + i), "tokens": [1] * 10}] * 60] * 2
    found = bench.Comparison(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "bfloat16", 2, PROMPTS, ["b"], rows, [own, peer], {"llama.cpp": "x y"}, True
    )
    text = shown(found, options(), Against(("openvino", "llama.cpp"), "assistant", Path("file")))
    assert [line for line in text.splitlines() if len(line) > 80] == [] and draft in text


@pytest.mark.parametrize(
    ("given", "reported"),
    [
        ("--against transformer", "against = 'transformer': did you mean 'transformers'"),
        ("--against transformers,transformers", "against = 'transformers' is given more than once"),
        ("--against transformers --temperature 0.7", "temperature = 0.7: must be 0 with against"),
        ("--against transformers --repetition-penalty 1.1", "repetition_penalty = 1.1: cannot be used with against; codec, depth"),
        ("--against transformers --batch 2", "batch = 2: must be 1 with against"),
        ("--against transformers --bound", "bound = True: cannot be measured with against"),
        ("--against transformers --device cuda", "device = 'cuda': must be cpu with against"),
        ("--against llama.cpp --gguf /no/such.gguf", "gguf = /no/such.gguf: must be a file for llama.cpp"),
        ("--against transformers --draft none", "is the plain loop"),
        ("--assistant embedded-draft", "assistant = embedded-draft: is for the engines of against"),
        ("--gguf file.gguf", "gguf = file.gguf: is for the engines of against"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_loaded(given: str, reported: str, redraft: Callable[..., Ran]) -> None:
    code, out, err = redraft("compare", "/no/such/model", *given.split())
    assert (code, out) == (2, "") and err.count("\n") == 1 and reported in err, err


def test_options_are_checked() -> None:
    with pytest.raises(UnknownMethod):
        Against(("nobody",)).check(options())
    with pytest.raises(InvalidInput, match=r"gguf = .*: must be a file for llama.cpp, which must be among"):
        Against(("transformers",), gguf=Path(__file__)).check(options())


@pytest.mark.torch
def test_registered_peers_lead_somewhere() -> None:
    for package, modes in bench.PEERS.values():
        assert "generate" in registry.load(package.target).does and modes[:2] == ("plain", "prompt lookup")
    assert tiny.V
