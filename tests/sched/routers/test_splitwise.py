from __future__ import annotations

from random import Random
from typing import Any

import pytest

from redraft.errors import Unavailable
from redraft.sched.router import Load
from tests.sched.test_router import opened, request

PROMPT, TOKEN, BOTH = (0,), (1,), (0, 1)


def prompts(queued: int = 0, running: int = 0, free: int = 100, **more: Any) -> Load:
    return Load(queued, running, free, stages=PROMPT, **more)


def tokens(running: int = 0, free: int = 100, queued: int = 0, **more: Any) -> Load:
    return Load(queued, running, free, stages=TOKEN, **more)


def test_prompts_join_the_shortest_queue_and_the_rest_the_most_free_memory() -> None:
    router, loads = opened("splitwise"), [prompts(500), prompts(400), tokens(1, 40), tokens(9, 50)]
    assert (router.route(request([1] * 200), loads), router.route(request([1] * 200), loads, stage=1)) == (1, 3)


def test_a_full_prompt_pool_takes_a_token_worker_which_returns_when_idle() -> None:
    router: Any = opened("splitwise:queue=1000")
    full, one = prompts(900), request([1] * 101)
    loads = [full, tokens(3), tokens(2)]
    assert router.route(one, [prompts(899), *loads[1:]]) == 0
    assert router.route(one, loads) == 1 and router.moved == {1}  # both have no queue
    assert router.route(one, [full, tokens(3, queued=101), tokens(2)]) == 1  # the mixed pool before the other
    assert router.route(one, [full, tokens(3, queued=950), tokens(2)]) == 2 and router.moved == {1, 2}
    assert router.route(one, [full, tokens(3, queued=950), tokens(2, queued=940)]) == 0  # nothing fits: the least loaded
    assert router.route(one, [prompts(), tokens(), tokens(1)], stage=1) == 1 and router.moved == {2}  # 1 is idle and at home


def test_a_long_prompt_may_run_where_nothing_waits() -> None:
    for loads, chosen in [([prompts(), tokens()], 0), ([prompts(1), tokens()], 1), ([prompts(1), tokens(queued=2)], 0)]:
        assert opened("splitwise:queue=1000").route(request([1] * 5000), loads) == chosen


def test_a_full_token_pool_takes_a_prompt_worker() -> None:
    router: Any = opened("splitwise")
    one = request([1] * 100, new=60)  # 5 blocks
    assert router.route(one, [prompts(7), tokens(free=6)], stage=1) == 1
    assert router.route(one, [prompts(7, free=9), prompts(7, free=8), tokens(1, free=5)], stage=1) == 0 and router.moved == {0}
    assert router.route(one, [prompts(7, 1, free=6), prompts(7, free=9), tokens(1, free=5)], stage=1) == 0
    assert router.route(one, [prompts(7, 1, free=4), prompts(7, free=5), tokens(1, free=4)], stage=1) == 2


def test_pools_are_a_partition() -> None:
    router: Any = opened("splitwise:queue=500")
    dice, homes = Random(0), [PROMPT, PROMPT, PROMPT, TOKEN, TOKEN, BOTH]
    moved = 0
    for _ in range(500):
        loads = [Load(dice.choice([0, 200, 480]), dice.randrange(3), dice.randrange(12), dice.random() < 0.8, 0, home) for home in homes]
        for stage in (0, 1):
            pools = router.pools(loads, stage)
            assert sorted(i for pool in pools for i in pool) == [i for i, load in enumerate(loads) if load.alive]
            try:
                chosen = router.route(request([1] * dice.randrange(1, 300)), loads, stage)
            except Unavailable:
                assert not any(load.alive for load in loads)
                continue
            assert stage in homes[chosen] or chosen in router.moved
            assert all(loads[i].tokens or i == chosen for i in router.moved)
        moved += len(router.moved)
    assert moved > 50


def test_all_mixed_is_one_pool() -> None:
    router, loads = opened("splitwise:queue=300"), [Load(400, 0, 3, stages=BOTH), Load(200, 0, 2, stages=BOTH)]
    assert router.route(request([1] * 50), loads) == 1
    assert router.route(request([1] * 500), loads) == 1
    assert router.route(request([1] * 50), loads, stage=1) == 0


def test_the_own_pool_comes_before_the_mixed_one() -> None:
    assert opened("splitwise:queue=500").route(request([1] * 50), [prompts(400), Load(stages=BOTH), tokens()]) == 0
    assert opened("splitwise:queue=500").route(request([1] * 50), [prompts(480), Load(stages=BOTH), tokens()]) == 1


def test_one_pool_left_runs_both_stages() -> None:
    router, loads = opened("splitwise"), [prompts(alive=False), tokens(2), tokens(1)]
    place = router.route(request([1] * 50), loads)
    assert place in (1, 2)
    with pytest.raises(Unavailable, match="none of 3 workers"):
        router.route(request([1]), [load._replace(alive=False) for load in loads])
