from __future__ import annotations

from redraft.sched.router import Load
from tests.sched.test_router import opened, request


def test_workers_take_turns_and_the_dead_are_left_out() -> None:
    router, loads = opened("round-robin"), [Load(), Load(queued_tokens=10**6), Load()]
    assert [router.route(request([1]), loads) for _ in range(5)] == [0, 1, 2, 0, 1]
    loads[2] = Load(alive=False)
    assert [router.route(request([1]), loads) for _ in range(3)] == [0, 1, 0]
    loads[2] = Load()
    assert [router.route(request([1]), loads) for _ in range(2)] == [1, 2]


def test_each_stage_has_its_own_turn() -> None:
    router, loads = opened("round-robin"), [Load(stages=(0,)), Load(stages=(1,)), Load(stages=(1,)), Load(stages=(0,))]
    places = [(router.route(request([1]), loads), router.route(request([1]), loads, stage=1)) for _ in range(3)]
    assert places == [(0, 1), (3, 2), (0, 1)]
