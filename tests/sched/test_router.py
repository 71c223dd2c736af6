"""What holds for every registered router, over random requests and loads, with workers that die, start again and are added."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from random import Random

import pytest

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.errors import Unavailable
from redraft.ops.format import PAGE
from redraft.sched.router import BLOCK, Load, OpenRouter
from redraft.serve.errors import refused

ROUTERS = sorted(registry.METHODS["route"])


def opened(text: str) -> OpenRouter:
    made: OpenRouter = registry.create("route", text).open()
    return made


def request(prompt: list[int], new: int | None = 16, salt: str = "", lora: str | None = None) -> Request:
    return Request("r", prompt, SamplingParams(max_tokens=new, lora=lora), salt)


def traffic(seed: int, split: bool) -> Iterator[tuple[Request, list[Load]]]:
    dice = Random(seed)
    starts = [0] * 6
    for _ in range(300):
        workers = 4 + (dice.random() < 0.5) * 2
        loads = []
        for i in range(workers):
            starts[i] += dice.random() < 0.05
            stages = ((0,), (1,))[i % 2] if split else (0,)
            loads.append(
                Load(dice.choice([0, 0, 300, 9000]), dice.randrange(9), dice.randrange(40), dice.random() < 0.7, starts[i], stages)
            )
        start = dice.randrange(4)
        prompt = [start] * 32 * dice.randrange(5) + [dice.randrange(99) for _ in range(40)]
        yield request(prompt, salt=dice.choice(["", "a"])), loads


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_only_workers_that_are_alive_and_run_the_stage_are_chosen(name: str, split: bool) -> None:
    for seed in range(4):
        router, again = opened(name), opened(name)
        for one, loads in traffic(seed, split):
            before = copy.deepcopy((one.prompt, one.params, loads))
            for stage in range(1 + split):
                able = [i for i, load in enumerate(loads) if load.alive and (router.any_stage or stage in load.stages)]
                if not able:
                    with pytest.raises(Unavailable):
                        router.route(one, loads, stage)
                    with pytest.raises(Unavailable):
                        again.route(one, loads, stage)
                else:
                    assert router.route(one, loads, stage) in able
            assert (one.prompt, one.params, loads) == before, "routing changed its input"
        _same_decisions(name, seed, split)


def _same_decisions(name: str, seed: int, split: bool) -> None:
    def decisions() -> list[int]:
        router, found = opened(name), []
        for one, loads in traffic(seed, split):
            for stage in range(1 + split):
                try:
                    found.append(router.route(one, loads, stage))
                except Unavailable:
                    found.append(-1)
        return found

    assert decisions() == decisions()


def test_no_worker_is_an_error_that_a_client_may_retry() -> None:
    with pytest.raises(Unavailable, match="none of 2 workers") as caught:
        opened("round-robin").route(request([1]), [Load(alive=False), Load(stages=(1,))])
    reply = refused(caught.value)
    assert (reply.status, reply.headers) == (503, {"Retry-After": "5"})


@pytest.mark.parametrize("name", ROUTERS)
def test_one_worker_takes_everything(name: str) -> None:
    router = opened(name)
    for one, _ in traffic(0, False):
        assert router.route(one, [Load(free_blocks=0, queued_tokens=10**6)]) == 0


def test_a_block_is_a_page_of_the_cache() -> None:
    assert BLOCK == PAGE
