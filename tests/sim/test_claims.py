"""The short form of scripts/prove serving-claims: what its figures are made of."""

from __future__ import annotations

import pytest

from redraft.sim.configuration import Configuration
from redraft.sim.figures import Limits
from redraft.sim.trace import Poisson
from scripts.claims import lamina
from scripts.claims.measure import crossing, goodputs, gpu, interval, verdict


def test_the_rate_is_where_the_room_ends() -> None:
    assert crossing([1.0, 2.0, 4.0], [0.5, 0.1, -0.1]) == pytest.approx(3.0)
    assert crossing([1.0, 2.0], [-0.1]) == 0.0
    assert crossing([1.0, 2.0], [0.5, 0.4]) == 2.0


def test_an_interval_decides_only_as_a_whole() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found == (2.0, pytest.approx(2 - 4.30 / 3**0.5), pytest.approx(2 + 4.30 / 3**0.5))
    assert [verdict(interval(values)) for values in ([0.9, 2.1], [2.0, 2.01], [0.5, 0.51])] == ["not decided", "confirmed", "refuted"]


def test_a_looser_limit_never_lowers_the_goodput() -> None:
    trace = Poisson(prompt=300, output=20, spread=0.5, requests=40).trace(0)
    limits = {text: Limits.parse(text) for text in ("ttft=0.5,itl=0.05", "ttft=1,itl=0.1")}
    one = Configuration(1, router="least-load")
    tight, loose = goodputs(lambda: one.cluster(gpu()), 1, trace, limits, (1.0, 4.0, 16.0)).values()
    assert 0 < tight <= loose


def test_a_roofline_says_both_sides_of_lamina() -> None:
    lines = list(lamina.run(2))
    assert sum(line.endswith("confirmed") for line in lines) == 4
