from __future__ import annotations

import asyncio
from typing import Any

from redraft.config import SamplingParams
from redraft.core.sequence import FinishReason, Request
from redraft.engine.output import Event, Stats
from redraft.serve.shell import Submission


def test_nothing_is_lost_that_was_received_before_it_was_taken() -> None:
    """The engine may have finished while its first event is still on its way to a slow client."""

    async def taken() -> list[Any]:
        request = Request("r", [1], SamplingParams(max_tokens=3))
        submission = Submission(request, left=1)
        found = []
        for token, reason in ((5, None), (6, None), (7, FinishReason.LENGTH)):
            submission.add([Event(request, 0, [token], "x", [False], [], reason, Stats())])
        async for events in submission.events():
            found += [token for event in events for token in event.tokens]
        return found

    assert asyncio.run(taken()) == [5, 6, 7]
