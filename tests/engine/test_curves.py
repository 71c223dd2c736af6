"""Curves of cache policies come back as they were kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from redraft.engine import curves
from redraft.engine.curves import Curve, Curves, Interval, Loss
from redraft.errors import CheckpointError

LOSS = {"books": Loss(Interval(0.01, -0.01, 0.02)), "needle": Loss(Interval(1.5, 1.0, 2.0), Interval(0.25, 0.125, 0.5))}
MADE = Curves(
    "abc",
    "smollm2",
    "bfloat16",
    "native",
    700,
    8,
    {"needle": 1.0},
    {"needle": 0.0},
    (
        Curve("keep=scissorhands:budget={tokens}", 25.0, 0.25, None, LOSS),
        Curve("codec=int8", None, 0.5, 1.25, LOSS),
    ),
)


def test_they_come_back(tmp_path: Path) -> None:
    path = MADE.save(tmp_path / "new" / "kept.json")
    assert Curves.load(path) == MADE and [one.name for one in path.parent.iterdir()] == ["kept.json"]
    nats, right = MADE.curves[0].loss["needle"]
    assert nats.visible and right is not None and not LOSS["books"].nats.visible


def test_a_curve_names_the_fields_of_a_request() -> None:
    assert [one.params(1000) for one in MADE.curves] == [{"keep": "scissorhands:budget=250"}, {"codec": "int8"}]


def test_they_are_kept_by_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path))
    assert Curves.of("abc") is None
    assert MADE.save() == curves.place("abc") == tmp_path / "cache-curves" / "abc.json"
    assert Curves.of("abc") == MADE and Curves.of("abd") is None


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        ("", "no curves of cache policies"),
        ("[]", "no curves of cache policies"),
        ("{}", "no curves of cache policies: 'version'"),
        ('{"version": 0}', "curves of version 0, this one reads 1; measure again: redraft bench cache --save"),
        ('{"version": 1, "curves": [{"policy": "codec=int8"}]}', "no curves of cache policies"),
        (json.dumps({"version": 1, **dataclasses.asdict(MADE), "more": 1}), "no curves of cache policies"),
    ],
)
def test_another_file_is_one_line(tmp_path: Path, content: str, reported: str) -> None:
    path = tmp_path / "kept.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=reported) as caught:
        Curves.load(path)
    assert "\n" not in str(caught.value)
