"""Streams: the pieces of a reply, signs of life while there is none, and an error if there is one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from time import monotonic
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from redraft.engine.output import Event
from redraft.serve.errors import Refused, refused
from redraft.serve.limits import unless_gone
from redraft.serve.prompts import LATE
from redraft.serve.reply import Writer
from redraft.serve.shell import Shell, Submission


async def paced(source: AsyncIterator[Any], every: float, deadline: float) -> AsyncIterator[Any]:
    """Yields what `source` yields, and None after each `every` seconds without any; Refused (504) at `deadline`, of time.monotonic."""
    queue: asyncio.Queue[tuple[Any, Exception | None]] = asyncio.Queue()

    async def pump() -> None:  # one task for all pieces: a time-out of `anext` would end the source
        try:
            async for value in source:
                queue.put_nowait((value, None))
            queue.put_nowait((None, StopAsyncIteration()))
        except Exception as error:
            queue.put_nowait((None, error))

    pumping = asyncio.ensure_future(pump())
    try:
        while True:
            try:
                async with asyncio.timeout(max(0.0, min(every, deadline - monotonic()))):
                    value, error = await queue.get()
            except TimeoutError:
                if monotonic() >= deadline:
                    raise Refused(504, LATE) from None
                yield None
                continue
            if isinstance(error, StopAsyncIteration):
                return
            if error is not None:
                raise error
            yield value
    finally:
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)


async def together(submissions: list[Submission]) -> AsyncIterator[tuple[int, Any]]:
    """Yields (index of the submission, events of a step) of all submissions, as they arrive."""
    if len(submissions) == 1:
        async for events in submissions[0].events():
            yield 0, events
        return
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def pump(place: int, submission: Submission) -> None:
        try:
            async for events in submission.events():
                queue.put_nowait((place, events))
            queue.put_nowait((place, None))
        except Exception as error:
            queue.put_nowait((place, error))

    pumps = [asyncio.ensure_future(pump(place, submission)) for place, submission in enumerate(submissions)]
    try:
        left = len(submissions)
        while left:
            place, received = await queue.get()
            if isinstance(received, Exception):
                raise received
            if received is None:
                left -= 1
            else:
                yield place, received
    finally:
        for one in pumps:
            one.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def whole(writer: Writer, deadline: float) -> dict[str, Any]:
    """The reply, when it is complete."""
    await ended(writer.submissions, deadline, writer.add)
    return writer.whole()


async def ended(submissions: list[Submission], deadline: float, add: Callable[[int, Event], Any] = lambda place, event: None) -> None:
    """Waits until all texts have ended; Refused (504) at `deadline`. add: gets the index of the submission and each of its events."""
    async for received in paced(together(submissions), 3600.0, deadline):
        if received is not None:
            place, events = received
            for event in events:
                add(place, event)


async def lines(writer: Writer, deadline: float, every: float) -> AsyncGenerator[bytes]:
    """The pieces of a stream."""
    try:
        if sent := writer.begin():
            yield sent
        async for received in paced(together(writer.submissions), every, deadline):
            if received is None:
                sent = writer.alive
            else:
                place, events = received
                sent = b"".join(writer.chunk(writer.add(place, event)) for event in events)
            if sent:
                yield sent
        last = writer.finish()
    except Exception as error:
        last = writer.failed(refused(error))
    yield last


class EventStream(Response):
    """The response. It and its requests end as soon as the client has left."""

    def __init__(self, shell: Shell, writer: Writer, content: AsyncGenerator[bytes], headers: dict[str, str]) -> None:
        headers = headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=writer.media_type)
        del self.headers["content-length"]
        self.shell, self.submissions, self.content = shell, writer.submissions, content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_gone(receive, self._send(send), lambda: self.shell.forget(*self.submissions))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self.content) as content:
            async for piece in content:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
