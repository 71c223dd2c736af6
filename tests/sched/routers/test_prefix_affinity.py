from __future__ import annotations

from random import Random
from typing import Any

from redraft.sched.router import Load
from redraft.sched.routers.prefix_affinity import Affinity, block_keys
from tests.sched.test_router import opened, request

BUSY, IDLE = Load(queued_tokens=40), Load()
SYSTEM = list(range(100, 100 + 96))


def tail(seed: int, length: int = 20) -> list[int]:
    return Random(seed).choices(range(1000), k=length)


def started(*prompts: tuple[int, list[int]], name: str = "prefix-affinity", count: int = 3, **options: Any) -> Any:
    """A router that sent each prompt to the worker named with it."""
    router = opened(name)
    for worker, prompt in prompts:
        assert router.route(request(prompt, **options), [Load(alive=i == worker) for i in range(count)]) == worker
    return router


def test_a_request_follows_the_longest_prefix() -> None:
    router = started((2, SYSTEM + tail(0)), (1, SYSTEM[:64] + tail(1)))
    assert router.route(request(SYSTEM + tail(2)), [IDLE, IDLE, BUSY]) == 2
    assert router.route(request(SYSTEM[:64] + tail(3, 40)), [IDLE, IDLE, BUSY]) == 1  # of two that have it, the one with less to compute
    assert router.route(request(SYSTEM[:64] + tail(4, 40)), [IDLE, BUSY, IDLE]) == 2
    assert router.route(request(tail(5, 60)), [IDLE, BUSY, BUSY]) == 0


def test_only_whole_blocks_count_and_the_last_token_always_runs() -> None:
    router = started((2, SYSTEM[:64]))
    assert router.route(request(SYSTEM[:32] + tail(0)), [IDLE, IDLE, Load(3)]) == 2
    assert router.route(request(SYSTEM[:31] + tail(1)), [IDLE, IDLE, Load(3)]) == 0
    assert router.route(request(SYSTEM[:32]), [BUSY, IDLE, Load(3)]) == 1  # its only block would not be reused


def test_the_tenant_and_the_adapter_are_part_of_a_prefix() -> None:
    router = started((2, SYSTEM + tail(0)), salt="a", lora="x")
    loads = [IDLE, IDLE, Load(3)]
    assert router.route(request(SYSTEM + tail(1), salt="b", lora="x"), loads) == 0
    assert router.route(request(SYSTEM + tail(1), salt="a", lora="y"), loads) == 1
    assert router.route(request(SYSTEM + tail(1), salt="a", lora="x"), loads) == 2


def test_an_overloaded_worker_gives_way() -> None:
    for overload, rows in [("0", 7), ("1", 7 + 96), ("2.5", 7 + 240)]:  # 96 tokens of the prompt need not be computed
        for more, chosen in [(0, 1), (1, 0)]:
            router = started((1, SYSTEM + tail(0)), name=f"prefix-affinity:overload={overload}", count=2)
            assert router.route(request(SYSTEM + tail(1)), [Load(7), Load(rows + more)]) == chosen


def test_a_prefix_that_moved_is_known_at_both_workers() -> None:
    router = started((1, SYSTEM + tail(0)))
    assert router.route(request(SYSTEM + tail(1)), [IDLE, Load(9000), BUSY]) == 0
    assert router.route(request(SYSTEM + tail(2)), [Load(5), Load(4), IDLE]) == 1
    assert router.route(request(SYSTEM + tail(3)), [Load(5), Load(6), IDLE]) == 0


def test_the_dead_are_not_chosen_and_a_new_start_forgets() -> None:
    router = started((2, SYSTEM + tail(0)), (1, SYSTEM[:64] + tail(1)))
    assert router.route(request(SYSTEM + tail(2)), [IDLE, BUSY, Load(alive=False)]) == 1
    router = started((2, SYSTEM + tail(0)), (1, SYSTEM[:64] + tail(1)))
    assert router.route(request(SYSTEM + tail(2)), [IDLE, BUSY, Load(starts=1)]) == 1
    assert router.route(request(SYSTEM + tail(3)), [IDLE, Load(alive=False), Load(starts=1)]) == 0


def test_unknown_prompts_go_where_the_least_is_known() -> None:
    router = opened("prefix-affinity")
    assert [router.route(request(tail(i, 100)), [IDLE] * 3) for i in range(6)] == [0, 1, 2, 0, 1, 2]


def test_memory_is_bounded_and_the_least_recent_is_forgotten_from_its_end() -> None:
    router: Any = opened("prefix-affinity:blocks=12")
    prompts = [tail(i, 32 * 5 + 1) for i in range(3)]
    for i in (0, 1, 0, 2):
        router.route(request(prompts[i]), [IDLE])
    assert [_known(router, prompt) for prompt in prompts] == [[1] * 5, [1, 1, 0, 0, 0], [1] * 5]
    for i in range(200):
        router.route(request(SYSTEM + tail(i, 32 * 30)), [IDLE, IDLE])
        known = {key: {w for w, keys in router.known.items() if key in keys} for keys in router.known.values() for key in keys}
        assert known == router.holders and all(len(keys) <= 12 for keys in router.known.values())


def _known(router: Affinity, prompt: list[int]) -> list[bool]:
    """Of each block of a prompt, whether it is known."""
    return [key in router.holders for key in block_keys(request(prompt), most=99)]
