"""Expectations follow from acceptance and cost; the file has the winner, or none and why; --config accepts it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from redraft import LLM, SamplingParams
from redraft.bench import compare as bench
from redraft.bench import tune
from redraft.bench.advice import Advice
from redraft.bench.compare import Comparison, Entry, Mode, Run, Turn, split
from redraft.bench.prompts import Prompt
from redraft.bench.svg import Point
from redraft.bench.tune import Candidate, Profile, Record, Tuned, TuneOptions, chosen, expected, recorded
from redraft.cli.serve import build, engine_of, load
from redraft.cli.tune import training_free
from redraft.engine.idle import forward_seconds
from tests import adapters
from tests.bench import fakes, html_page

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [Prompt(f"p{i}", "ab"[i % 2], prompt=f"w{10 + i} w{20 + i} w{10 + i}") for i in range(4)]
CURVE = [Point(1, 10, 10, 10), Point(2, 10, 10, 10), Point(4, 20, 20, 20)]


def recordings(*texts: tuple[list[int], list[tuple[int, ...]]], **given: Any) -> Profile:
    """Texts that ran together: nodes and paths of each."""
    return Profile(batches=[{i: Record(*one) for i, one in enumerate(texts)}], **given)


PLAIN = recordings(([0] * 70, [()] * 70), steps=70, seconds=1.05, forward=0.7, cached=70 * 20, total=1.15)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> LLM:
    return LLM(str(folder), dtype="float32", prefix_sharing=False, cache_memory=1 << 20)


# ---- expectations


def profile(drafting: float = 0.0) -> Profile:
    """Two thirds of the steps keep nodes 0 and 2 of three, the others nothing of none."""
    return recordings(([3, 3, 0] * 10, [(0, 2), (0, 2), ()] * 10), steps=30, seconds=1.0, drafting=drafting)


@pytest.mark.parametrize(("rows", "kept", "drafted"), [(1, 2 / 3, 2 / 3), (2, 2 / 3, 4 / 3), (3, 4 / 3, 2), (16, 4 / 3, 2)])
def test_a_smaller_draft_is_the_first_nodes(rows: int, kept: float, drafted: float) -> None:
    assert profile().kept(rows) == pytest.approx(kept) and profile().drafted(rows) == pytest.approx(drafted)
    assert profile().by_depth == [pytest.approx(2 / 3)] * 2


def test_the_expected_speed() -> None:
    free = expected("some", 1, profile(), PLAIN, CURVE)  # two rows take as long as one
    assert (free.tokens, free.cost, free.drafting) == (pytest.approx(5 / 3), pytest.approx(1), 0)
    assert free.speedup == pytest.approx(1.15 / (0.1 + 1.05 * 3 / 5))
    dear = expected("some", 3, profile(), PLAIN, CURVE)  # a step of 15 ms, 10 of them forward, which doubles in two of three steps
    assert dear.cost == pytest.approx((15 + 10 * 2 / 3) / 15) and dear.tokens == pytest.approx(7 / 3)
    slow = expected("some", 3, profile(drafting=0.45), PLAIN, CURVE)  # 15 ms a step to draft 2 nodes
    assert slow.drafting == pytest.approx(1) and slow.cost == pytest.approx(dear.cost + 1)
    assert expected("some", 2, profile(drafting=0.45), PLAIN, CURVE).drafting == pytest.approx(2 / 3)


def test_a_batch_pays_for_the_rows_of_all_texts() -> None:
    one = [0] * 30, [()] * 30
    two = recordings(one, one, steps=30, seconds=0.9, forward=0.9, total=0.9)
    drafted = [1] * 15, [(0,)] * 15
    found = expected("some", 1, recordings(drafted, drafted, steps=15), two, CURVE)
    assert found.cost == pytest.approx(2) and found.speedup == pytest.approx(1)  # 4 rows after 2


def test_a_batch_ends_with_its_slowest_text() -> None:
    """Both draft a node a step; one keeps all and ends after 15 steps, the other keeps none and runs alone for 15 more."""
    one = [0] * 30, [()] * 30
    plain = recordings(one, one, steps=30, seconds=0.6, forward=0.3, total=0.8)  # 20 ms a step, 5 of them for each text beside the pass
    found = expected("some", 1, recordings(([1] * 15, [(0,)] * 15), ([1] * 30, [()] * 30), steps=30), plain, CURVE)
    seconds = 15 * (0.020 + 2 * 0.005) + 15 * (0.010 + 0.005)
    assert found.tokens == pytest.approx(1 + 15 / 45) and found.speedup == pytest.approx(0.8 / (0.2 + seconds))
    assert found.cost == pytest.approx(seconds / 0.6)


def test_batches_do_not_run_together() -> None:
    record = Record([0] * 10, [()] * 10)
    plain = Profile(batches=[{0: record}, {1: record}], steps=20, seconds=0.2, forward=0.2, total=0.2)
    kept = Profile(batches=[{0: Record([1] * 5, [(0,)] * 5)}, {1: Record([1] * 10, [()] * 10)}], steps=15)
    assert expected("some", 1, kept, plain, CURVE).speedup == pytest.approx(20 / 15)


def candidate(draft: str, rows: int | None, speedup: float, drafted: float) -> Candidate:
    return Candidate(draft, rows, 2.0, drafted, 1.25, 0.125, speedup)


def test_the_best_few_are_measured() -> None:
    found = [candidate("a", rows, 2 + rows / 10, rows) for rows in (1, 2, 4, 8)] + [candidate("b", 4, 1.5, 4), candidate("c", 4, 1.4, 4)]
    found += [candidate("auto", None, 0.5, 3), candidate("a", 16, 2.9, 8.1)]
    taken = [(one.draft, one.rows) for one in chosen(found, 3)]
    assert taken == [("auto", None), ("a", 16), ("a", 4), ("b", 4)]  # 8 rows draft the same as 16


def test_steps_are_recorded_as_the_engine_counts_them(plain: LLM) -> None:
    llm = plain.sibling(draft="ngram")
    group = bench.PromptGroup("a", 0, tuple(PROMPTS), (PARAMS,) * len(PROMPTS))
    guard, forward = llm.engine.drafter.own, llm.runner.forward
    with recorded(llm) as found:
        run = bench.generate(llm, group)
    assert run.accepted > 0 and sum(map(len, found.paths)) == run.accepted
    assert len(found.nodes) == run.steps - len(PROMPTS)  # without the steps that read prompts
    assert found.by_depth == pytest.approx([count / len(found.paths) for count in run.by_depth])
    assert len(found.batches) == 1 and len(found.batches[0]) == len(PROMPTS) and found.course(99, lambda rows, texts: 1.0)[0] <= found.steps
    lengths = [len(turn.prompt) for one in run.conversations for turn in one]
    assert min(lengths) < found.context < max(lengths) + 12
    assert 0 < found.forward + found.drafting + found.observing < found.seconds
    assert not {"begin", "propose", "observe"} & vars(guard).keys() and llm.runner.forward == forward
    assert llm.engine.verifier.own is found.inner
    assert [[turn.tokens for turn in one] for one in run.conversations] == [
        [turn.tokens for turn in one] for one in bench.generate(plain, group).conversations
    ]


def test_times_of_steps(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(tune, "forward_seconds", lambda engine, *given: calls.append(given[:3]) or given[0] * len(calls) / 1e3)
    found = tune.step_times(plain, 9, 4, 30)
    assert [point.x for point in found] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32]
    assert len(calls) == len(found) * (tune.TIMES + 1) and {cached for _, cached, _ in calls} == {30}
    assert all(texts == min(rows, 4) for rows, _, texts in calls)
    for point in found:
        times = [point.x * (at + 1) for at, (rows, _, _) in enumerate(calls) if rows == point.x][1:]
        assert (point.low, point.y, point.high) == pytest.approx((times[0], times[len(times) // 2], times[-1]))


def test_a_timed_step_has_these_rows_texts_and_cached_tokens(
    plain: LLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    forward = plain.runner.forward
    monkeypatch.setattr(plain.runner, "forward", lambda batch, taps: seen.append(batch) or forward(batch, taps))
    assert (forward_seconds(plain.engine, 7, 20, 3) or 0) > 0
    (batch,) = seen
    assert len(batch.tokens) == 7 and [int(root) for root in batch.roots] == [0, 3, 5]
    assert sorted(batch.positions.tolist()) == [20, 20, 20, 21, 21, 21, 22]
    assert forward_seconds(plain.engine, 8, plain.max_model_len, 4) is None
    plain.load_lora("x", adapters.make(tmp_path / "x", folder))
    own = plain.runner.adapters["x"]
    plain.unload_lora("x")
    assert (forward_seconds(plain.engine, 3, 20, 2, own) or 0) > 0
    assert [one.adapters for one in seen] == [[None] * 3, [own] * 2]
    plain.runner.memory.check()
    assert not plain.runner.memory.paged.table._held


# ---- advice


def advice(plain: LLM, seconds: list[list[float]], given: dict[str, Any] | None = None) -> Advice:
    """seconds[entry][round] of every group: the plain loop, "suffix" with 4 rows, auto."""
    options = TuneOptions(("auto", "suffix"), PARAMS, rounds=len(seconds[0]))
    groups = split(PROMPTS, 1, PARAMS)
    candidates = [candidate("suffix", 4, 1.5, 3.25), candidate("auto", None, 1.2, 2)]
    entries = [Entry("none", Mode.BASELINE, plain, (None, None))]
    entries += [Entry(one.name, Mode.HOT, plain.sibling(draft=one.draft), (None, None)) for one in candidates]
    runs = [[[Run([[Turn([1], [5] * 10)]], one, steps=10) for _ in groups] for one in times] for times in seconds]
    profiles = {"suffix": profile(), "auto": profile()}
    comparison = Comparison(entries, groups, runs, [], [])
    return Advice(Tuned(CURVE, PLAIN, profiles, candidates, candidates, comparison), options, "a: b # c", given or {})


FASTER, SLOWER, SOMETIMES = [0.5, 0.4, 0.6], [1.5, 1.5, 1.5], [0.5, 0.4, 1.1]


def check(found: Advice, text: str) -> None:
    """The winner and every measured speed are in the file."""
    for row in found.overall:
        line = next(line for line in text.splitlines() if line.startswith(f"# {row.method:24}"))
        assert f"{row.tokens_per_second:.1f}" in line.split()
        if row.speedup is not None:
            assert line.split()[-2:] == [f"{row.speedup:.2f}x", f"{row.speedup_low:.2f}-{row.speedup_high:.2f}"]


def test_the_winners_settings_are_a_config(plain: LLM, tmp_path: Path) -> None:
    found = advice(plain, [[1.0] * 3, FASTER, SLOWER], {"threads": 1, "dtype": "float32"})
    text = found.yaml()
    check(found, text)
    assert yaml.safe_load(text) == {"model": "a: b # c", "threads": 1, "dtype": "float32", "draft": "suffix", "draft-rows": 4}
    assert "2.00x (1.67-2.50)" in text and "1.50x expected" in text
    assert all(len(line) <= 80 for line in [*text.splitlines(), *found.text()])
    (tmp_path / "a.yaml").write_text(text)
    engine, _ = build(load(tmp_path / "a.yaml", "--config"))
    assert (engine.draft, engine.schedule.draft_rows, engine.model.threads, engine.model.model) == ("suffix", 4, 1, "a: b # c")
    assert engine_of(tmp_path / "a.yaml", {"draft": "none", "model": None}).draft == "none"
    with pytest.raises((AssertionError, StopIteration)):
        check(found, text.replace("20.0", "21.0"))


@pytest.mark.parametrize("times", [SLOWER, SOMETIMES, [1.0] * 3])
def test_without_a_winner_the_file_says_none_and_why(plain: LLM, times: list[float]) -> None:
    text = advice(plain, [[1.0] * 3, times, SLOWER]).yaml()
    assert yaml.safe_load(text) == {"model": "a: b # c", "draft": "none"}
    assert "draft: none, because no drafter was faster than the plain loop in every" in text and "the nearest, suffix, 4 rows" in text


def test_one_round_has_no_winner(plain: LLM) -> None:
    found = advice(plain, [[1.0] * 2, FASTER[:2], SLOWER[:2]])
    assert found.best is not None and tune.winner(found.overall, 1) is None


def test_a_winner_may_choose_its_rows_and_others_within_its_spread_are_named(plain: LLM) -> None:
    found = advice(plain, [[1.0] * 3, FASTER, [0.4, 0.4, 0.5]])
    assert yaml.safe_load(found.yaml()) == {"model": "a: b # c", "draft": "auto"}
    assert found.why()[-1] == "within its spread: suffix, 4 rows"


def test_control_characters_cannot_leave_a_comment(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "name", "x\u2028port: 1\x85host: a")
    assert set(yaml.safe_load(advice(plain, [[1.0] * 3, FASTER, SLOWER]).yaml())) == {"model", "draft", "draft-rows"}


def test_the_page_has_the_curve_and_the_expectations(plain: LLM) -> None:
    page = advice(plain, [[1.0] * 3, FASTER, SLOWER]).page()
    tables = html_page.tables(page)
    assert html_page.loads(page) == [] and len(html_page.plots(page)) == 3
    assert [cells[1:3] for cells in tables["Cost of a step"][1:]] == [["1", "10.0"], ["2", "10.0"], ["4", "20.0"]]
    assert tables["Expected speed"][1][:7] == ["suffix", "4", "3.25", "2.00", "1.25", "0.12", "15.0"]
    assert tables["Expected speed"][1][7] == "20.0 (16.7-25.0)"
    assert tables["Acceptance by depth"][1] == ["suffix", "66.7%", "66.7%"]


# ---- the command


@pytest.fixture
def words(folder: Path, tmp_path: Path) -> list[str]:
    lines = [{"id": prompt.id, "category": prompt.category, "prompt": prompt.prompt} for prompt in PROMPTS]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = f"--prompts {tmp_path}/p.jsonl --max-tokens 6 --ignore-eos --rounds 2 --best 2 --dtype float32 --draft auto --draft ngram"
    return ["tune", str(folder), *options.split()]


@pytest.mark.parametrize("batch", ["1", "2"])
def test_the_command_writes_a_file_that_generate_and_serve_accept(
    words: list[str], batch: str, tmp_path: Path, redraft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = redraft(*words, "--batch", batch, "--yaml", f"{tmp_path}/a.yaml", "--html", f"{tmp_path}/a.html")
    assert code == 0 and "kept at depth" in out and "estimated duration" in err
    assert [line for line in out.splitlines() if len(line) > 80] == []
    assert html_page.loads((tmp_path / "a.html").read_text()) == []
    found = yaml.safe_load((tmp_path / "a.yaml").read_text())
    assert found["dtype"] == "float32" and found["draft"] in ("none", "auto", "ngram")
    engine, _ = build(load(tmp_path / "a.yaml", "--config"))
    assert engine.draft == found["draft"]
    code, out, err = redraft(
        "generate", "--config", f"{tmp_path}/a.yaml", "--prompt", "w5 w6", "--max-tokens", "3", "--raw", "--ignore-eos"
    )
    assert code == 0 and out and f", {found['draft']}, same-text" in err.replace("\n", ", ")


def test_without_a_file_stdout_has_the_settings_alone(words: list[str], redraft: Any) -> None:
    code, out, err = redraft(*words)
    assert code == 0 and set(yaml.safe_load(out)) >= {"model", "draft", "dtype"} and "kept at depth" in err
    assert all(line.startswith("#") or ": " in line for line in out.splitlines() if line)


def test_an_adapter_is_in_every_step_and_in_the_file(
    words: list[str], folder: Path, tmp_path: Path, redraft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, seen = f"x={adapters.make(tmp_path / 'x', folder)}", Counter[bool]()
    timed, measure = tune.forward_seconds, bench.measure
    monkeypatch.setattr(tune, "forward_seconds", lambda engine, *given: seen.update([given[3].name == "x"]) or timed(engine, *given))
    monkeypatch.setattr(
        bench, "measure", lambda llm, group, state: seen.update(one.lora == "x" for one in group.params) or measure(llm, group, state)
    )
    code, _, err = redraft(*words, "--lora", own, "--yaml", f"{tmp_path}/a.yaml")
    assert code == 0, err
    assert seen[True] and not seen[False]
    engine, _ = build(load(tmp_path / "a.yaml", "--config"))
    assert engine.model.adapters == {"x": str(tmp_path / "x")}
    assert ", adapter x," in (tmp_path / "a.yaml").read_text().replace("\n# ", " ")


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        ("--lora x=a --lora y=b", "one adapter is measured at a time, 2 are given"),
        ("--yaml /nowhere/a.yaml", "yaml = /nowhere/a.yaml: there is no folder /nowhere"),
        ("--html /", "html = /: is a folder"),
        ("--rounds 1", "rounds = 1: must be 2 or more"),
        ("--best 0", "best = 0: must be 1 or more"),
        ("--batch 0", "batch = 0: must be 1 or more"),
        ("--draft none", "is the plain loop"),
        ("--prompts /nowhere.jsonl", "cannot be read"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_loaded(options: str, reported: str, redraft: Any) -> None:
    code, _, err = redraft("tune", "/no/such/model", *options.split())
    assert code == 2 and reported in err and err.count("\n") == 1


def test_drafters_that_were_not_measured_are_named_with_their_expectation(plain: LLM) -> None:
    found = advice(plain, [[1.0] * 3, FASTER, SLOWER])
    assert not [note for note in found.notes() if note.startswith("not measured")]
    others = [candidate("ngram", rows, speedup, 1.0) for rows, speedup in ((1, 0.8), (2, 0.9))] + [candidate("copyspec", 1, 1.1, 1.0)]
    profiles = {**found.tuned.profiles, "ngram": profile(), "copyspec": profile(), "token-recycling": Profile()}
    found.tuned = replace(found.tuned, profiles=profiles, expectations=[*found.tuned.expectations, *others])
    (note,) = [note for note in found.notes() if note.startswith("not measured")]
    assert note.endswith("below the best 4 by expectation: copyspec 1.10x, ngram 0.90x, token-recycling (no step)")
    assert f"- {note}" in " ".join(" ".join(found.text()).split())


@pytest.mark.parametrize(("batch", "small"), [(1, 0), (2, 4)])
def test_groups_that_do_not_fill_the_batch_are_counted(plain: LLM, batch: int, small: int) -> None:
    found = advice(plain, [[1.0] * 3, FASTER, SLOWER])
    found.options = TuneOptions(("auto",), PARAMS, batch=batch)
    named = [note for note in found.notes() if "prompt groups have fewer" in note]
    assert len(named) == bool(small) and all(note.startswith(f"{small} of {small} prompt groups") for note in named)


def test_a_batch_of_more_texts_than_draft_rows_is_tuned(plain: LLM) -> None:
    """32 draft rows for 64 texts: some have one, the others none."""
    options = TuneOptions(("ngram",), PARAMS, rounds=2, batch=64)
    prompts = [Prompt(f"p{i}", "a", prompt=f"w{3 + i % 50} w{20 + i // 50} w{3 + i % 50}") for i in range(80)]
    found = tune.tune(plain, options, prompts, lambda what: None, lambda seconds: None)
    assert [one.rows for one in found.expectations] == [1] and len(found.plain.batches) == 2
    for batch in found.profiles["ngram"].batches:  # later some texts have ended, and the others may draft more
        first = [record.nodes[0] for record in batch.values()]
        assert max(first) == 1 and min(first) == 0 and sum(first) <= 32
    assert found.curve[-1].x >= 64 + 32


def test_the_candidates_need_no_training() -> None:
    found = training_free()
    assert found[0] == "auto" and {"suffix", "copyspec", "ngram", "token-recycling", "self-skip"} <= set(found)
    assert not {"none", "draft-model", "rsd-c", "vocabtrim"} & set(found)
