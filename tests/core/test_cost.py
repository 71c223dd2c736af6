"""The cost model follows the steps that it sees, keeps what it measured, and survives a bad file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from redraft.core.cost import FLAT, KNOTS, ROWS, STEEP, CostModel, Sizes


def machine(rows: int) -> float:
    """A machine whose steps jump after 4 rows."""
    return 0.010 if rows <= 4 else 0.016 + 0.001 * (rows - 5)


@pytest.mark.parametrize("prior", [FLAT, STEEP])
def test_a_calibration_gives_the_measured_times_and_the_priors_shape_beyond(prior: tuple[float, ...]) -> None:
    cost = CostModel(prior)
    cost.calibrate({(rows, 0): machine(rows) for rows in (1, 2, 4, 5, 8, 16)})
    for rows in (1, 2, 4, 5, 8, 16):
        assert cost.relative(rows) == pytest.approx(machine(rows) / machine(1))
    assert cost.relative(64) / cost.relative(16) == pytest.approx(prior[KNOTS.index(64)] / prior[KNOTS.index(16)])
    assert cost.calibrated
    times = [cost.relative(rows) for rows in range(1, 2 * ROWS)]
    assert times == sorted(times) and cost.relative(2 * ROWS) > cost.relative(ROWS)


def test_steps_correct_a_wrong_prior() -> None:
    cost, rng = CostModel(FLAT), random.Random(0)
    for _ in range(600):
        rows = rng.choice((1, 2, 4, 5, 8))
        cost.observe(rows, 0, 0, machine(rows) * rng.uniform(0.95, 1.05))
    for rows in (2, 4, 5, 8):
        assert cost.relative(rows) / cost.relative(1) == pytest.approx(machine(rows) / machine(1), rel=0.08)
        assert cost.seconds(rows, 0, 0) == pytest.approx(machine(rows), rel=0.08)


def test_one_disturbed_step_changes_little() -> None:
    cost = CostModel()
    for _ in range(50):
        cost.observe(1, 0, 0, 0.01)
    cost.observe(4, 0, 0, 5.0)
    assert cost.seconds(1, 0, 0) == pytest.approx(0.01, rel=0.1)


def test_attention_follows_from_the_model() -> None:
    cost = CostModel(STEEP, Sizes(weights=1000, flops=100, kv=2, cell=1))
    fixed, each = cost.line(500, 1)
    assert fixed == pytest.approx(1.0 + cost.text), "500 tokens of 2 bytes are as long to read as 1000 bytes of weights"
    assert each == pytest.approx(5 * cost.more), "and cost a row five times the arithmetic of its linear layers"
    assert cost.line(500, 5)[1] == pytest.approx(each / 5), "each row of five texts sees a fifth of the tokens"
    assert cost.seconds(1, 500) is None, "before the first step"


def test_it_is_kept_and_a_bad_file_counts_as_absent(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cost.json"
    first = CostModel(STEEP, path=path)
    first.calibrate({(1, 0): 0.01, (8, 0): 0.05, (1, 100): 0.02, (8, 100): 0.13})
    first.save()
    assert [one.name for one in path.parent.iterdir()] == [path.name], "no partial file is left"
    again = CostModel(FLAT, path=path)
    assert again.calibrated and again.shape == pytest.approx(first.shape) and again.unit == first.unit
    assert (again.token, again.cell) == (first.token, first.cell) == (pytest.approx(0.0), pytest.approx(0.01))
    good = json.loads(path.read_text())
    bad = [
        "", "[]", "{", json.dumps({**good, "rows": [1]}), json.dumps({**good, "unit": 0}), json.dumps({**good, "unit": None}),
        json.dumps({**good, "cell": -1}), json.dumps({**good, "rounds": [[[8, 0, 1.0]]]}), json.dumps({**good, "rounds": [[[1, 0]]]}),
        "[" * 100_000, json.dumps({**good, "unit": 0}).replace('"unit": 0', '"unit": ' + "9" * 400),
        json.dumps({**good, "shape": [*good["shape"][1:], float("nan")]}), json.dumps({**good, "shape": "x"}),
    ]  # fmt: skip
    for text in bad:
        path.write_text(text)
        cost = CostModel(FLAT, path=path)
        assert not cost.calibrated and cost.shape == list(FLAT) and cost.unit is None, text
    CostModel(path=Path("/proc/nowhere/cost.json")).save()  # a place that cannot be written is no error


def test_rounds_count_at_once_and_a_later_process_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    first = CostModel(STEEP, path=path)
    first.add_round({(1, 0): 0.01, (8, 0): 0.05})
    assert first.calibrated and first.relative(8) == pytest.approx(5)
    later = CostModel(STEEP, path=path)
    assert later.rounds == first.rounds and later.relative(8) == pytest.approx(5)
    later.add_round({(1, 0): 0.02, (8, 0): 0.04})
    later.add_round({(1, 0): 0.02, (8, 0): 0.06})
    assert later.relative(8) == pytest.approx(3), "the median of the ratios 5, 2 and 3"
    later.add_round({(1, 0): 0.01})
    assert len(CostModel(path=path).rounds) == 4, "a round with fewer sizes counts too"


def test_attention_is_measured_too() -> None:
    cost = CostModel(STEEP, Sizes(weights=1000, flops=100, kv=2, cell=1))

    def seconds(rows: int, cached: int) -> float:
        return 0.01 * (1 + 0.1 * (rows - 1) + cached * (0.002 + 0.0005 * rows))

    cost.calibrate({(rows, cached): seconds(rows, cached) for rows, cached in ((1, 0), (8, 0), (1, 400), (8, 400))})
    cost.text = 0.0
    assert cost.seconds(8, 1000) == pytest.approx(seconds(8, 1000)) and cost.seconds(1, 50) == pytest.approx(seconds(1, 50))


@pytest.mark.parametrize("times", [{(2, 0): 1.0}, {(1, 0): 0.0}, {(1, 0): 1.0, (2, 0): -1.0}, {(1, 5): 1.0}])
def test_impossible_times_are_refused(times: dict[tuple[int, int], float]) -> None:
    with pytest.raises(ValueError, match="one row"):
        CostModel().calibrate(times)
