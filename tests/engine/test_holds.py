"""Prefixes that the requests of a batch share are held until the last of them has ended, or given up where memory is short."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from random import Random

import pytest

from redraft.config import SamplingParams
from redraft.core.sequence import Group, Request, Sequence
from redraft.engine.engine import Engine
from redraft.sched.sarathi import Sarathi
from tests.contracts import plain
from tests.contracts.identity import drive, engine

PREFIX = [i % plain.VOCAB for i in range(7, 71)]  # two pages
NEW = SamplingParams(temperature=0.8, max_tokens=6, seed=3, ignore_eos=True)


class Together(Sarathi):
    """All requests that begin with PREFIX are one group. Those that do not come first."""

    def groups(self, waiting: Seq[Sequence], page: int) -> list[tuple[Group, list[Sequence]]]:
        shared = [seq for seq in waiting if seq.tokens[:64] == PREFIX]
        others = [seq for seq in waiting if seq not in shared]
        return [*((Group(()), [seq]) for seq in others), (Group(tuple(PREFIX)), shared)]


def made(pool: int = 12, **options: object) -> Engine:
    found = engine(pool=pool, **options)  # type: ignore[arg-type]
    found.scheduler = Together(token_budget=96, max_seqs=options.get("max_seqs", 2))  # type: ignore[arg-type]
    return found


def request(name: str, prompt: Seq[int], params: SamplingParams = NEW) -> Request:
    return Request(name, list(prompt), params)


def batch(at: Engine, count: int = 4) -> list[Request]:
    """Requests of the group, queued and arranged."""
    found = [request(str(i), [*PREFIX, i, i + 1]) for i in range(count)]
    for one in found:
        at.add(one)
    at.arrange()
    return found


def finish(at: Engine) -> dict[str, list[int]]:
    texts: dict[str, list[int]] = {}
    for _ in range(1000):
        for event in at.step():
            texts.setdefault(event.request.id, []).extend(event.tokens)
        at.memory.check()
        if not at.has_work:
            return texts
    raise AssertionError("the engine makes no progress")


def test_a_prefix_stays_while_others_want_its_pages() -> None:
    at = made(max_seqs=1)
    requests = batch(at)
    at.step()
    assert len(at.holds) == 1 and at.memory.used() == 3, "holding takes no memory: the first text lists the same pages"
    while at.running:
        at.step()
    assert at.table.match([*PREFIX, 0], "") == 64 and at.table.idle_matched([*PREFIX, 0], "") == 0, "nobody may evict the prefix"
    texts = finish(at)
    assert len(at.holds) == at.memory.used() == 0 and at.table.match([*PREFIX, 0], "") == 64
    assert texts.keys() == {"1", "2", "3"} and [one.cached_tokens for one in requests] == [0, 64, 64, 64]


def test_the_texts_are_those_without_a_batch() -> None:
    own, batched = made(), made()
    for i in range(4):
        own.add(request(str(i), [*PREFIX, i, i + 1]))
    batch(batched)
    assert finish(own) == finish(batched)


def test_arranging_reorders_within_a_priority_only() -> None:
    at = made()
    prompts = {"a": [*PREFIX, 1], "b": [5, 6], "c": [*PREFIX, 2], "d": [6]}
    for name, prompt in prompts.items():
        at.add(Request(name, prompt, NEW, priority=-1 if name == "c" else 0))
    at.arrange()
    assert [seq.request.id for seq in at.waiting] == ["c", "b", "d", "a"]
    finish(at)


def test_aborts_let_the_prefix_go() -> None:
    at = made()
    batch(at)
    at.step()
    for i in (3, 1, 0):
        at.abort(str(i))
        assert len(at.holds) == 1
    at.abort("2")
    at.memory.check()
    assert len(at.holds) == at.memory.used() == 0


def test_a_text_that_fails_lets_the_prefix_go(monkeypatch: pytest.MonkeyPatch) -> None:
    at = made()
    batch(at, 1)
    at.step()
    assert len(at.holds) == 1

    def fails(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(at.runner, "forward", fails)
    (event,) = at.step()
    assert event.error is not None
    at.memory.check()
    assert len(at.holds) == at.memory.used() == 0


@pytest.mark.parametrize(("prompt", "new"), [(10, 100), (100, 6)], ids=["grows", "waits"])
def test_a_text_that_lacks_memory_takes_that_of_a_prefix(prompt: int, new: int) -> None:
    at = made(pool=5, max_seqs=1)
    batch(at, 2)
    while len(at.waiting) == 2 or at.running:
        at.step()
    group = at.waiting[0].request.group
    assert group is not None and group.held and at.memory.used() == 2
    at.add(Request("urgent", [2] * prompt, NEW.but(max_tokens=new), priority=-1))
    assert [*map(len, finish(at).values())] == [new, 6]
    assert not group.held and len(at.holds) == at.memory.used() == 0


def test_nothing_is_held_without_a_prefix_cache() -> None:
    at = made(sharing=False)
    batch(at)
    at.step()
    assert len(at.holds) == 0
    assert finish(at).keys() == {"0", "1", "2", "3"}


@pytest.mark.parametrize("seed", range(8))
def test_any_batch_under_any_pressure_gives_its_texts(seed: int) -> None:
    dice = Random(seed)
    requests = []
    for i in range(10):
        prompt = [*(PREFIX if dice.random() < 0.7 else ()), *(dice.randrange(plain.VOCAB) for _ in range(dice.randint(1, 30)))]
        requests.append(request(str(i), prompt, NEW.but(seed=i, max_tokens=dice.randint(1, 30), n=dice.choice((1, 1, 2)))))
    truth = drive(engine(pool=60), [Request(one.id, list(one.prompt), one.params) for one in requests], [0] * 10).texts
    at = made(pool=dice.randint(5, 9), max_seqs=dice.randint(1, 5))
    gone, texts = set(dice.sample(range(10), 3)), {}
    for one in requests:
        at.add(one)
    at.arrange()
    while at.has_work:
        for event in at.step():
            assert event.error is None
            name = event.request.id if event.request.params.n == 1 else f"{event.request.id}/{event.index}"
            texts.setdefault(name, []).extend(event.tokens)
        at.memory.check()
        if gone and dice.random() < 0.2:
            at.abort(str(gone.pop()))
            at.memory.check()
    assert len(at.holds) == at.memory.used() == 0
    for name, text in truth.items():
        assert texts.get(name, text)[: len(text)] == text[: len(texts.get(name, text))]
