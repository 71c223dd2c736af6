from __future__ import annotations

from redraft.sched.router import TEXT, Load
from tests.sched.test_router import opened, request


def test_queued_tokens_and_those_that_texts_will_draw_are_counted() -> None:
    router = opened("least-load")
    assert router.route(request([1]), [Load(2 * TEXT + 1), Load(0, 2), Load(TEXT, 1)]) == 1
    assert router.route(request([1]), [Load(2 * TEXT), Load(0, 2), Load(TEXT - 1, 1)]) == 2


def test_requests_spread_if_each_counts_at_once() -> None:
    router, loads = opened("least-load"), [Load()] * 4
    for length in [700, 100, 300, 200, 150, 50, 90]:
        chosen = router.route(request([1] * length), loads)
        loads[chosen] = loads[chosen]._replace(queued_tokens=loads[chosen].queued_tokens + length)
    assert [load.queued_tokens for load in loads] == [700, 100 + 150 + 90, 300, 200 + 50]
