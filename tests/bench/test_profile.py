"""`redraft bench profile`: what steps it runs, that they leave nothing behind, and its file. No test asserts durations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from redraft import LLM
from redraft.bench import profile
from redraft.bench.profile import CONTEXTS, DECODED, Case, Profile, ProfileOptions
from redraft.core.step_cost import Size, Step, StepCost
from redraft.errors import InvalidInput
from redraft.ops import library

Ran = tuple[int, str, str]  # exit code, stdout, stderr


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("embedded", draft="none", threads=1, token_budget=64, max_seqs=8, cache_memory="64MB")


def test_cases_are_of_all_kinds_and_fit() -> None:
    found = profile.cases(ProfileOptions(), 512, 64, 8192, 4000)
    assert len(found) == len(set(found)) > 100
    assert all(case.rows <= 512 and case.texts + case.prompts <= 64 and case.tokens <= ProfileOptions.most for case in found)
    assert {case.context for case in found if not case.prompts} == {32, *CONTEXTS[1:]}
    assert {case.before for case in found if not case.texts} == set(CONTEXTS)
    assert {512, 1} <= {case.rows for case in found} and any(case.texts and case.prompts for case in found)
    assert min(case.chunk for case in found if case.prompts) == profile.SHORTEST
    assert found == profile.cases(ProfileOptions(), 512, 64, 8192, 4000) != profile.cases(ProfileOptions(seed=1), 512, 64, 8192, 4000)
    assert all(case.longest <= 100 for case in profile.cases(ProfileOptions(), 512, 64, 100, 4000))
    assert all(case.tokens <= 20 * 16 for case in profile.cases(ProfileOptions(), 512, 64, 8192, 20))
    assert not profile.cases(ProfileOptions(), 512, 64, 8192, 1)


def test_a_case_runs_the_steps_that_it_names_and_leaves_nothing(llm: LLM) -> None:
    engine, ticks = llm.engine, count()

    def sizes(case: Case) -> list[Size]:
        steps = profile.run(engine, case, 0, lambda: float(next(ticks)))
        assert all(step.seconds == 1.0 for step in steps), "one call of the clock before and one after"
        assert not engine.has_work and engine.memory.used() == 0 and engine.memory.available() == engine.memory.blocks
        engine.memory.check()
        return [step.size for step in steps]

    assert sizes(Case(texts=3, context=64)) == [Size(3, 3, 3.0 * seen, 3.0 * seen) for seen in range(66, 66 + DECODED)]
    assert sizes(Case(prompts=1, before=32, chunk=10)) == [Size(10, 1, 10 * (32 + 5.5), 42.0)], "cached tokens are not computed"
    assert sizes(Case(prompts=4, chunk=8)) == [Size(32, 4, 4 * 8 * 4.5, 32.0)]
    assert sizes(Case(texts=2, context=32, prompts=1, before=64, chunk=5)) == [Size(7, 3, 2 * 34 + 5 * 67.0, 2 * 34 + 69.0)]


def test_no_round_finds_the_prompts_of_another(llm: LLM) -> None:
    case = Case(prompts=2, chunk=32)
    first, second = (profile.run(llm.engine, case, number) for number in range(2))
    assert [step.size for step in first] == [step.size for step in second]


def test_a_step_counts_with_the_median_of_its_rounds() -> None:
    one, other = Case(texts=1, context=32), Case(texts=2, context=32)
    small, large = Size(1, 1, 33.0, 33.0), Size(2, 2, 66.0, 66.0)
    rounds = {one: [[Step(small, s)] for s in (1.0, 9.0, 2.0)], other: [[Step(large, s)] for s in (3.0, 4.0, 40.0)]}
    found = Profile([one, other], rounds)
    assert found.typical([other, one]) == [Step(large, 4.0), Step(small, 2.0)]
    cost = found.fit({"model": "made"})
    assert cost.seconds(*small) == pytest.approx(2.0) and cost.seconds(*large) == pytest.approx(4.0)
    assert cost.about["model"] == "made" and cost.about["fit"]["held_out"] == 1
    assert cost.about["fit"]["median_error"] > 0.5, "of a fit that knew the larger step only"


def test_options_are_checked() -> None:
    assert ProfileOptions.of(quick=True, rounds=None, seed=3) == ProfileOptions(3, 2048, 8, 3)
    assert ProfileOptions.of(quick=False, rounds=1, seed=0) == ProfileOptions(rounds=1)
    with pytest.raises(InvalidInput, match="rounds = 0: must be 1 or more"):
        ProfileOptions(rounds=0)


NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(library.why_not()), reason="no native kernels"))


@pytest.mark.parametrize("backend", [NATIVE, "numpy"])
def test_the_verb_writes_what_the_simulator_reads(
    redraft: Callable[..., Ran], tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "CONTEXTS", (0, 32))
    path = tmp_path / "measured.json"
    given = f"--quick --rounds 1 --threads 1 --token-budget 16 --max-seqs 4 --backend {backend} --output {path}"
    code, out, err = redraft("bench", "profile", *given.split())
    assert code == 0 and f"written to {path}" in err
    assert f"{backend} backend, 1 thread" in out and "that were left out of the fit" in out
    assert max(map(len, out.splitlines())) <= 80
    cost = StepCost.read(path)
    assert cost.about["model"] == "embedded" and cost.about["backend"] == backend and cost.about["threads"] == 1
    assert cost.rows[-1] == 16 and cost.seconds(1, 1, 1.0, 1.0) > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--rounds 0", "rounds = 0: must be 1 or more"),
        ("--output /nowhere/at/all.json", "output = /nowhere/at/all.json: there is no folder /nowhere/at"),
        ("--backend nump", "did you mean 'numpy'?"),
        ("--cache-memory 1KB", "cache"),
    ],
)
def test_bad_input_is_one_line(redraft: Callable[..., Ran], given: str, message: str) -> None:
    code, out, err = redraft("bench", "profile", *given.split())
    assert (code != 0, out, err.count("\n")) == (True, "", 1) and message in err
