"""Workers are killed every few seconds while many clients stream. Every client receives the whole text that its request gets from one
engine, and at the end no worker holds a block.

The server runs in this process with its workers in processes of their own, as in `redraft serve --replicas N`. Requests come from a fixed
set of bodies, greedy and sampled, with stop strings, several texts, cache policies, penalties and a JSON schema, each with a seed. One
engine computes each of them first, alone. Then clients stream them over HTTP for a while, and a worker is ended with SIGKILL again and
again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}}, "required": ["name"]}
CHOICES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1},
    {"temperature": 0.7, "stop": ["\n\n", ". The"]},
    {"temperature": 1.0, "n": 2},
    {"temperature": 0.6, "cache": {"keep": "streaming-llm:sinks=4,recent=96"}},
    {"temperature": 0, "cache": {"codec": "int8"}},
    {"temperature": 0.9, "structured_outputs": {"json": SCHEMA}},
    {"temperature": 0, "speculation": "off"},
]


@dataclass
class Seen:
    """What happened to the clients."""

    answers: int = 0
    tokens: int = 0
    problems: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)


def bodies(count: int, longest: int, rng: random.Random) -> list[dict[str, Any]]:
    from redraft.bench.prompts import load

    texts = [prompt.prompt for prompt in load() if prompt.prompt]
    made = []
    for i in range(count):
        text = rng.choice(texts)
        limits = {"max_tokens": rng.randrange(longest // 4, longest), "seed": i, "ignore_eos": True}
        body = {"prompt": text[: rng.randrange(40, 800)], **limits, **CHOICES[i % len(CHOICES)]}
        if "structured_outputs" in body:
            del body["ignore_eos"]
        made.append(body)
    return made


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[list[str], int]:
    """The text of each choice and the number of tokens, streamed."""
    texts, tokens = [""] * body.get("n", 1), 0
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True, "return_token_ids": True}) as reply:
        if reply.status != 200:
            raise RuntimeError(f"{reply.status}: {(await reply.text())[:200]}")
        ended = False
        async for line in reply.content:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                ended = True
                break
            part = json.loads(line[6:])
            if "error" in part:
                raise RuntimeError(str(part["error"])[:200])
            for choice in part["choices"]:
                texts[choice["index"]] += choice["text"]
                tokens += len(choice.get("token_ids") or ())
        if not ended:
            raise RuntimeError("the stream broke")
    return texts, tokens


async def client(url: str, some: list[dict[str, Any]], right: list[list[str]], until: float, rng: random.Random, seen: Seen) -> None:
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while time.monotonic() < until:
            i = rng.randrange(len(some))
            try:
                texts, tokens = await ask(session, url, some[i])
            except (RuntimeError, aiohttp.ClientError, TimeoutError) as error:
                seen.problems.append(f"request {i} was lost: {type(error).__name__} {error}")
                continue
            seen.answers += 1
            seen.tokens += tokens
            if texts != right[i]:
                seen.problems.append(f"request {i}: another text: {texts!r:.120} instead of {right[i]!r:.120}")


async def killer(cluster: Any, until: float, every: float, rng: random.Random, seen: Seen) -> None:
    while time.monotonic() < until:
        await asyncio.sleep(rng.uniform(0.5, 1.5) * every)
        there = [member for member in cluster.members if member.link is not None]
        if there:
            member = rng.choice(there)
            os.kill(member.link.process.pid, signal.SIGKILL)
            seen.kills[member.begin.name] += 1


def main() -> None:
    parser = argparse.ArgumentParser(prog=sys.argv[0], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--replicas", type=int, help="2, without --instances")
    parser.add_argument("--instances", help="prefill=N,decode=M, instead of --replicas")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--every", type=float, default=4, help="mean seconds between two kills; 0: none")
    parser.add_argument("--bodies", type=int, default=54)
    parser.add_argument("--longest", type=int, default=128, help="max_tokens, at most")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    from redraft.config import EngineConfig, SamplingParams
    from redraft.llm import LLM
    from redraft.serve.config import ServeConfig
    from redraft.serve.run import server
    from redraft.workers.several import workers_of

    rng = random.Random(options.seed)
    some = bodies(options.bodies, options.longest, rng)
    config = EngineConfig.of(model=options.model, max_model_len=1024, draft="auto", cache_memory="512MB")
    settings = ServeConfig(
        port=0,
        log_level="warning",
        access_log=False,
        shutdown_timeout=0,
        max_queue=1024,
        request_timeout=0,
        replicas=options.replicas or (1 if options.instances else 2),
        instances=options.instances,
    )

    def serve(made: Any) -> threading.Thread:
        thread = threading.Thread(target=made.run, name="server")
        thread.start()
        while not made.started:
            time.sleep(0.05)
        return thread

    def url(made: Any) -> str:
        return f"http://127.0.0.1:{made.servers[0].sockets[0].getsockname()[1]}"

    async def alone(at: str) -> list[list[str]]:
        async with aiohttp.ClientSession() as session:
            return [(await ask(session, at, body))[0] for body in some]

    made = server(LLM(config=config), settings)
    thread = serve(made)
    right = asyncio.run(alone(url(made)))
    made.should_exit = True
    thread.join()
    del made

    front, cluster = workers_of(config, settings.stages, "prefix-affinity", SamplingParams(), 60.0)
    made = server(front, settings, cluster)
    thread = serve(made)
    loop = cluster.loop
    seen, until = Seen(), time.monotonic() + options.seconds

    async def attack() -> None:
        clients = [client(url(made), some, right, until, random.Random(1000 + i), seen) for i in range(options.streams)]
        kills = [killer(cluster, until, options.every, rng, seen)] if options.every else []
        await asyncio.gather(*clients, *kills)

    asyncio.run(attack())
    while not all(member.ready for member in cluster.members):
        time.sleep(0.05)
    held = asyncio.run_coroutine_threadsafe(cluster.check(), loop).result(60)
    left = len(cluster._tickets) + made.service.shell.busy
    made.should_exit = True
    thread.join()
    if any(blocks or texts for blocks, texts in held) or left:
        seen.problems.append(f"blocks and texts that workers hold: {held}; requests of the front: {left}")
    print(f"{options.model}: workers {', '.join(settings.stages)}; {options.streams} streams for {options.seconds:g} s")
    print(f"{sum(seen.kills.values())} workers ended by SIGKILL {dict(seen.kills)}, {cluster.moved} moves")
    print(f"{seen.answers} answers with {seen.tokens} tokens; {len(seen.problems)} problems")
    for problem in seen.problems[:10]:
        print(f"  {problem}")
    sys.exit(bool(seen.problems))


if __name__ == "__main__":
    main()
