"""A run: requests are sent at their times, whether or not earlier ones have ended. Ctrl-C keeps what was measured."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from redraft.bench.load.client import Client, Target
from redraft.bench.load.figures import Record, Run
from redraft.bench.load.workload import Ask, Load, Words

Tick = Callable[[Record], None]  # called when a request has ended
Progress = Callable[[int], AbstractContextManager[Tick]]  # of so many requests


@dataclass(frozen=True)
class Found:
    """A run and what it found out. words: None if no prompt was made of words; warmups: failed warm-ups."""

    model: str
    words: Words | None
    warmups: list[Record]
    run: Run


async def measure(target: Target, load: Load, progress: Progress) -> Found:
    """Raises RedraftError if the server does not report its model. Failures of requests are in their records."""
    warmups, asks = load.asks()
    target.check(asks)
    async with Client.session(target) as session:
        client = Client(target, session)
        model = await client.model()
        words = await client.words(model) if any(ask.input_len is not None for ask in asks) else None

        def encode(ask: Ask) -> bytes:
            return json.dumps(target.body(model, ask, words or Words())).encode()

        warmed = await drive(client, warmups, encode, load.concurrency, lambda record: None)
        if warmed.interrupted:
            return Found(model, words, [], Run([], 0.0, interrupted=True))
        with progress(len(asks)) as tick:
            run = await drive(client, asks, encode, load.concurrency, tick)
        await client.recount(model, run.records, tokenizer=not run.interrupted)
    return Found(model, words, [record for record in warmed.records if record.failure is not None], run)


async def drive(client: Client, asks: list[Ask], encode: Callable[[Ask], bytes], concurrency: int | None, tick: Tick) -> Run:
    """Sends all, at most `concurrency` at once. A request without a time waits until another has ended. A request with a time that
    finds no slot waits as well, which shows as its lag."""
    slots = asyncio.Semaphore(concurrency or max(len(asks), 1))
    records = [Record(due=ask.due, wanted_input=ask.input_len) for ask in asks]
    client.restart()

    async def one(ask: Ask, body: bytes, record: Record) -> None:
        if ask.due is not None:
            await slots.acquire()
        try:
            await client.send(body, record)
        finally:
            slots.release()
        tick(record)

    interrupted = False
    try:
        async with asyncio.TaskGroup() as group:
            for ask, record in zip(asks, records):
                if ask.due is None:
                    await slots.acquire()
                body = encode(ask)  # prepared before its time, so that preparation does not delay it
                if ask.due is not None and (wait := ask.due - client.now()) > 0:
                    await asyncio.sleep(wait)
                group.create_task(one(ask, body, record))
    except asyncio.CancelledError:
        interrupted = True
    return Run(records, client.now(), interrupted)
