"""The simulator beside the real engine, the short form of scripts/prove simulator. Where a step takes what the cost says, all times are
equal. Measured times are not asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redraft import LLM
from redraft.bench.load.workload import poisson
from redraft.core.step_cost import Size, Step, StepCost
from scripts.proofs import simulator
from scripts.proofs.simulator import Lengths, Line, Modelled, Processor, Ran, real, simulated

COST = StepCost((1, 16, 64), (0.004, 0.01, 0.03), 0.001, 2e-6, 3e-6)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("embedded", draft="none", threads=1, token_budget=64, max_seqs=8, max_model_len=256, cache_memory="1MB")


def load(llm: LLM, count: int, share: float, longest: int = 120) -> tuple[list[Lengths], list[float]]:
    lengths = simulator.sizes(None, count, 20.0, longest, seed=0)
    return lengths, poisson(count, simulator.rate(llm, lengths, share, COST), seed=0)


@pytest.mark.parametrize("share", [0.5, 5.0], ids=["steady", "overload"])
def test_with_the_times_of_the_cost_both_do_the_same_steps(llm: LLM, share: float) -> None:
    lengths, due = load(llm, 40, share)
    ran, found = real(llm, lengths, due, Modelled(COST)), simulated(llm, lengths, due, COST)
    assert ran.tokens == found.tokens == sum(one.output for one in lengths)
    assert ran.seconds == pytest.approx(found.seconds)
    assert np.sort(ran.ttft) == pytest.approx(np.sort(found.ttft)) and np.sort(ran.e2el) == pytest.approx(np.sort(found.e2el))
    assert np.sort(ran.itl) == pytest.approx(np.sort(found.itl)), "each time between two tokens"
    assert ran.between == pytest.approx(0.0, abs=1e-9)
    assert not llm.engine.has_work and llm.engine.memory.used() == 0


def test_both_preempt_alike_where_memory_is_short(llm: LLM) -> None:
    before, blocks = llm.engine.preemptions, llm.engine.memory.blocks
    lengths = [Lengths(60, 150)] * 8
    assert 32 * blocks < 8 * 210, f"all texts together fit into {blocks} blocks"
    ran, found = real(llm, lengths, [0.0] * 8, Modelled(COST)), simulated(llm, lengths, [0.0] * 8, COST)
    assert llm.engine.preemptions > before
    assert np.sort(ran.e2el) == pytest.approx(np.sort(found.e2el)) and np.sort(ran.itl) == pytest.approx(np.sort(found.itl))


def test_a_run_by_the_processors_time_waits_for_nothing(llm: LLM) -> None:
    lengths, due = load(llm, 12, 0.5)
    due = [1e6 * at for at in due]
    ran = real(llm, lengths, due, Processor())
    assert ran.seconds > due[-1] and len(ran.ttft) == 12 and ran.tokens == sum(one.output for one in lengths)
    assert sum(step.size.rows for step in ran.steps) == sum(one.prompt + one.output - 1 for one in lengths), "each token runs once"


def test_lengths_are_those_of_the_trace_and_shorter(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival,input,output\n0,1000,40\n1,10,1\n2,90000,400\n")
    assert simulator.sizes(path, 4, 20.0, 512, 0) == [(50, 2), (1, 1), (492, 20), (50, 2)], "from the first one again if they are few"
    drawn = simulator.sizes(None, 2000, 20.0, 8192, 0)
    assert drawn == simulator.sizes(None, 2000, 20.0, 8192, 0) != simulator.sizes(None, 2000, 20.0, 8192, 1)
    assert 0.9 < np.mean([one.prompt for one in drawn]) / (1235 / 20) < 1.1, "the mean of that distribution, shrunk"


def ran(scale: float, steps: list[Step] | None = None) -> Ran:
    values = scale * np.linspace(1.0, 2.0, 101)
    return Ran(values, values, values, 10.0, 5, steps or [])


def test_the_report_says_what_is_out_and_which_steps_are_wrong() -> None:
    slow = [Step(Size(1, 1, 9.0, 9.0), 0.01), Step(Size(20, 2, 99.0, 30.0), 0.02)]
    runs = [ran(1.0, slow), ran(1.1, slow), ran(1.02, slow)]
    compared = simulator.lines(runs, ran(1.11), [ran(1.1), ran(1.1), ran(1.02)])
    assert [line.held for line in compared] == [True, False] * 3, "a median may be off by 10 %, a P99 must lie between the runs"
    assert {round(line.own_ratio, 9) for line in compared} == {1.0}, "the middle of 1.1, 1 and 1"
    assert not Line("ttft", 50, (1.0, 1.0), 1.2, ()).held and Line("ttft", 99, (1.0, 3.0), 1.2, ()).held
    text = list(simulator.table(compared))
    assert text[2].endswith("out") and not text[1].endswith("out") and max(map(len, text)) <= 80
    steps = list(simulator.terms(runs, StepCost((1, 20), (0.01, 0.04))))
    assert [line.split()[-3] for line in steps[1:]] == ["1.000", "2.000", "1.000", "2.000", "1.667"] and max(map(len, steps)) <= 80


def test_the_command_ends_with_a_verdict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    given = f"embedded --requests 10 --runs 1 --rounds 1 --quick --clock cpu --token-budget 16 --max-seqs 4 --json {path}"
    monkeypatch.setattr("sys.argv", ["prove simulator", *given.split()])
    assert simulator.main() in (0, 1)
    out = capsys.readouterr().out
    written = sum(one.output for one in simulator.sizes(None, 10, 20.0, 512, 0))
    assert f"tokens of the runs {written}, of the simulation {written}" in out and "medians within 10%: " in out
    assert max(map(len, out.splitlines())) <= 80
    found: dict[str, Any] = json.loads(path.read_text())
    assert len(found["requests"]) == 10 and len(found["steps"]) == 1 and len(found["compared"]) == 6
    assert StepCost(tuple(found["cost"]["rows"]), tuple(found["cost"]["times"])).seconds(1, 1, 1.0, 1.0) > 0
