"""Encoders before prompts, and workers that change their stage."""

from __future__ import annotations

import random

import pytest

from redraft.sim.epd import Encoders, Switching, joined
from redraft.sim.trace import Arrival
from tests.sim.worlds import Linear, arrivals, cluster, run


def test_images_are_encoded_at_once_by_all_encoders() -> None:
    assert Encoders(4, 1.0).encode(10.0, 8) == 12.0
    assert Encoders(4, 1.0, spread=False).encode(10.0, 8) == 18.0
    assert Encoders(4, 1.0).encode(10.0, 0) == 10.0


@pytest.mark.parametrize("spread", [True, False])
def test_with_one_encoder_spreading_changes_nothing(spread: bool) -> None:
    encoders = Encoders(1, 0.5, spread)
    assert [encoders.encode(at, images) for at, images in ((0.0, 3), (0.1, 2), (9.0, 1))] == [1.5, 2.5, 9.5]


def test_each_image_has_one_encoder_in_turn() -> None:
    encoders = Encoders(3, 1.0)
    assert encoders.shards(4) + encoders.shards(2) == [0, 1, 2, 0, 1, 2]


def test_the_order_of_shards_does_not_matter() -> None:
    shards = [(i, [10 * i, 10 * i + 1]) for i in range(5)]
    mixed = random.Random(0).sample(shards, 5)
    assert joined(mixed) == joined(shards) == [0, 1, 10, 11, 20, 21, 30, 31, 40, 41]


def test_workers_change_their_stage_and_one_of_each_stays() -> None:
    where = cluster(split=(3, 1), route="least-load", cost=Linear(0.05, 0, 0.01, 0), max_seqs=8)
    switching, left = Switching(where, every=2.0), []
    decide = switching.decide

    def checked() -> None:
        decide()
        stages = [load.stages for load in where.front.loads]
        left.append((stages.count((0,)), stages.count((1,))))

    switching.decide = checked  # type: ignore[method-assign]
    run(where, [Arrival(0.2 * i, 20, 300) for i in range(60)])
    assert switching.switches > 0
    assert min(map(min, left)) >= 1
    assert max(decoding for _, decoding in left) == 3


def test_nobody_changes_while_queues_are_alike() -> None:
    where = cluster(split=(2, 2), route="least-load")
    switching = Switching(where, every=1.0)
    switching.queues = lambda: [3.0, 2.0]  # type: ignore[method-assign]
    run(where, arrivals(20, 4.0))
    assert switching.switches == 0
