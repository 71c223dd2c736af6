"""The cost of a step: what is fitted, what is written and read, and what a damaged file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redraft.core.batch import Batch
from redraft.core.step_cost import KNOTS, Size, Step, StepCost, positive_least_squares
from redraft.core.testing import view, work
from redraft.core.tree import EMPTY
from redraft.errors import InvalidInput

COST = StepCost((1, 4, 16, 64), (0.004, 0.005, 0.01, 0.03), 0.001, 2e-6, 3e-6, {"model": "made"})


def sizes(count: int) -> list[Size]:
    """Batches of chunks and decoding texts, up to 80 rows."""
    rng = np.random.default_rng(0)
    found = [Size(n, n, 100.0 * n, 100.0 * n) for n in (1, 4, 16, 64)]
    for _ in range(count):
        rows = rng.integers(1, 12, rng.integers(1, 8))
        cached = rng.integers(0, 4000, len(rows))
        found.append(Size(int(rows.sum()), len(rows), float(rows @ (cached + (rows + 1) / 2)), float((rows + cached).sum())))
    return found


def test_the_size_of_a_batch_counts_what_its_rows_see() -> None:
    works = [work(range(5), rows=3), work(range(10), stored=9), work(range(8), stored=6)]
    batch = Batch.pack(works, [EMPTY] * 3, view(works))
    seen = [1, 2, 3, 10, 7, 8]  # by each row: the tokens before it, and itself
    assert Size.of(batch) == (6, 3, sum(seen), 3 + 10 + 8)


def test_a_fit_finds_the_terms_that_made_the_times() -> None:
    steps = [Step(size, COST.seconds(*size)) for size in sizes(300)]
    found = StepCost.fit(steps, {"model": "again"})
    assert np.abs(found.errors(steps)).max() < 0.02, "the line has knots where the times have them, or between"
    assert [found.text, found.cell, found.token] == pytest.approx([COST.text, COST.cell, COST.token], rel=0.02)
    assert found.about == {"model": "again"} and set(found.rows) <= {*KNOTS, *(step.size.rows for step in steps)}


def test_times_are_positive_and_rise_with_every_part_whatever_was_measured() -> None:
    rng = np.random.default_rng(1)
    found = StepCost.fit([Step(size, float(rng.uniform(0.001, 0.1))) for size in sizes(40)])
    assert found.times[0] > 0 and list(found.times) == sorted(found.times) and min(found.text, found.cell, found.token) >= 0
    low = found.seconds(3, 2, 50.0, 40.0)
    assert low > 0 and all(found.seconds(*more) >= low for more in ((9, 2, 50.0, 40.0), (3, 3, 50.0, 40.0), (3, 2, 60.0, 50.0)))


def test_a_clock_that_stood_still_says_nothing() -> None:
    size = Size(1, 1, 1.0, 1.0)
    assert StepCost.fit([Step(size, 0.0), Step(size, 0.5)]).seconds(*size) == pytest.approx(0.5)
    with pytest.raises(InvalidInput, match="at least one measured step"):
        StepCost.fit([Step(size, 0.0)])


def test_the_line_goes_on_beyond_its_knots() -> None:
    line = StepCost((2, 4, 8), (1.0, 2.0, 3.0))
    assert [line.seconds(rows, 1, 0, 0) for rows in (1, 2, 3, 4, 6, 8, 12)] == [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    assert StepCost((4,), (2.0,)).seconds(9, 1, 0, 0) == 2.0, "one number of rows says nothing about others"


def test_no_weight_is_negative() -> None:
    terms = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert positive_least_squares(terms, np.array([3.0, 5.0, 7.0])) == pytest.approx([1.0, 2.0])
    assert positive_least_squares(terms, np.array([5.0, 3.0, 1.0])) == pytest.approx([3.0, 0.0]), "the best without a fall"
    assert positive_least_squares(terms, -np.ones(3)).tolist() == [0.0, 0.0]


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(COST.document()))
    assert StepCost.read(path) == COST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format = 'other': 'redraft step cost 1' is needed"),
        ({"rows": 3}, "rows = 3: a list is needed"),
        ({"rows": [1, 16, 4, 64]}, r"rows = \(1, 16, 4, 64\): whole numbers from 1"),
        ({"rows": [1, 4, [16], 64]}, "whole numbers from 1"),
        ({"rows": [0, 4, 16, 64]}, "whole numbers from 1"),
        ({"rows": []}, "whole numbers from 1"),
        ({"times": [1.0]}, r"times = \(1.0,\): 4 numbers are needed"),
        ({"times": [0.0, 1.0, 2.0, 3.0]}, "seconds above 0"),
        ({"times": [1.0, 2.0, 1.5, 3.0]}, "none less than the one before"),
        ({"times": [1.0, 2.0, 3.0, float("nan")]}, "seconds above 0"),
        ({"times": [1, 2, 3, 10**400]}, None),
        ({"text": -1e-3}, "text = -0.001: seconds, 0 or more"),
        ({"cell": None}, "cell = None: seconds, 0 or more"),
        ({"token": float("inf")}, "token = inf: seconds, 0 or more"),
        ({"token": True}, "token = True: seconds, 0 or more"),
        ({"about": "here"}, "about = 'here': an object is needed"),
    ],
    ids=str,
)
def test_a_damaged_file_names_the_field(tmp_path: Path, change: dict[str, Any], message: str | None) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(COST.document() | change))
    if message is None:
        StepCost.read(path)  # large, but a number
        return
    with pytest.raises(InvalidInput, match=message) as error:
        StepCost.read(path)
    assert str(error.value).startswith(f"cost = {path}: ") and "\n" not in str(error.value)


def test_a_file_that_is_none_says_how_to_make_one(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    for content in (None, "{", "3", "[" * 100_000):
        if content is not None:
            path.write_text(content)
        with pytest.raises(InvalidInput, match="`redraft bench profile` writes such a file"):
            StepCost.read(path)
