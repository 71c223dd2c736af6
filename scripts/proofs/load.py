"""Many clients at once, some of which misbehave. Each client that stays receives the text that its request would get alone, and no
page is held afterwards.

A server in this process (a thread with uvicorn, as in `redraft serve`) answers the clients of another process for a while: streams and
whole replies, greedy and sampled, with their own drafters, budgets, predictions and cache policies, several texts, shared prefixes, under
JSON schemas and regular expressions, and conversations that must call a tool.
Some clients disconnect after a few chunks, some before the first, and some request more than the context holds. The pool is so small
that texts are preempted. Then the idle server runs every answered request alone, and the texts are compared. Requests come from a
fixed set of bodies, each with a seed, so each has one right answer.

Requests with a verifier that rejects at random are not compared. It keeps the distribution, not the text, which depends on the number
of nodes that a step had room for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECULATIONS: list[Any] = [
    None, None, "off", {"method": "copyspec"}, {"method": "token-recycling", "budget": 6}, {"method": "aggressive"},
    {"method": "union:parts=copyspec+token-recycling"}, {"method": "aded"}, {"method": "draft-model:length=3"},
    {"method": "rsd-s", "verifier": "recursive"}, {"budget": 0},
]  # fmt: skip
CACHES: list[Any] = [
    None, None, None, None, {"keep": "streaming-llm:sinks=4,recent=64"}, {"codec": "int8"}, {"read": "page-top-k:tokens=96"},
    {"keep": "ada-kv:budget=96"},
]  # fmt: skip
KINDS = ("stay", "stay", "stay", "stay", "whole", "leave", "leave", "cancel", "long")


@dataclass(frozen=True)
class Sent:
    """A body, whether its answers are compared, and where it is sent."""

    body: dict[str, Any]
    compared: bool
    path: str = "/v1/completions"


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 3}},
    "required": ["name"],
    "additionalProperties": False,
}
STRUCTURES: list[Any] = [{"json": SCHEMA}, {"regex": "[a-f]{4,40}( = [0-9]+)?;"}, {"choice": ["return None", "pass", "raise"]}]
TOOLS = [
    {"type": "function", "function": {"name": "find", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}},
]


def bodies(count: int, seed: int, context: int) -> list[Sent]:
    """The requests, drawn from our own suite's prompts."""
    from redraft.bench.prompts import load

    rng = random.Random(seed)
    texts = [prompt.prompt for prompt in load() if prompt.prompt]
    made = []
    for i in range(count):
        text = rng.choice(texts)
        body: dict[str, Any] = {
            "prompt": text[: rng.randrange(40, max(41, min(len(text), context)))],
            "max_tokens": rng.randrange(4, 72),
            "temperature": rng.choice([0, 0, 0.7, 1.0]),
            "top_p": rng.choice([1, 1, 0.9]),
            "seed": i,
            "ignore_eos": rng.random() < 0.5,
            "n": rng.choice([1, 1, 1, 1, 3]),
            "priority": rng.choice([0, 0, -1, 5]),
        }
        speculation, cache = rng.choice(SPECULATIONS), rng.choice(CACHES)
        if rng.random() < 0.15:
            body["prediction"] = {"content": text[len(body["prompt"]) :][:400] or text}
            speculation = None
        if rng.random() < 0.2:
            body["stop"] = [rng.choice(["\n\n", "return", "self"])]
        if rng.random() < 0.25:
            body["structured_outputs"] = rng.choice(STRUCTURES)
        if speculation is not None:
            body["speculation"] = speculation
        if cache is not None:
            body["cache"] = cache
        path = "/v1/completions"
        if rng.random() < 0.2:
            path, prompt = "/v1/chat/completions", body.pop("prompt")
            body = {name: value for name, value in body.items() if name not in ("structured_outputs", "stop")}
            body |= {"messages": [{"role": "user", "content": prompt}], "tools": TOOLS, "tool_choice": rng.choice(["required", "auto"])}
        made.append(Sent(body, not (isinstance(speculation, dict) and "verifier" in speculation), path))
    return made


# ---- the other process


async def client(port: int, seconds: float, streams: int, seed: int, sent: list[Sent], context: int) -> dict[str, Any]:
    """The answers, as (index of the body, texts), of clients that stayed; and counts of all events."""
    import aiohttp

    found: list[tuple[int, list[str]]] = []
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    end = time.monotonic() + seconds
    server = f"http://127.0.0.1:{port}"

    async def one(session: aiohttp.ClientSession, rng: random.Random) -> None:
        kind, place = rng.choice(KINDS), rng.randrange(len(sent))
        body, url = dict(sent[place].body, stream=kind != "whole"), server + sent[place].path
        if kind == "long":
            if "prompt" in body:
                body["prompt"] = "word " * (2 * context)
            else:
                body["messages"] = [{"role": "user", "content": "word " * (2 * context)}]
            body.pop("cache", None)  # some policies have no end of the context
        if kind == "cancel":
            try:
                async with asyncio.timeout(rng.random() * 0.3), session.post(url, json=body) as reply:
                    await reply.read()
                counts["too late to cancel"] += 1
            except TimeoutError:
                counts["cancelled"] += 1
            return
        async with session.post(url, json=body) as reply:
            if kind == "long":
                if reply.status == 400:
                    counts["over-long, refused"] += 1
                else:
                    wrong.append(f"over-long: {reply.status}: {(await reply.text())[:200]}")
                return
            if reply.status == 429:
                counts["refused for now (429)"] += 1
                await asyncio.sleep(rng.random())
                return
            if reply.status != 200:
                wrong.append(f"{reply.status}: {(await reply.text())[:200]} {body}")
                return
            parts: list[list[dict[str, Any]]] = [[] for _ in range(body["n"])]
            if kind == "whole":
                for choice in (await reply.json())["choices"]:
                    parts[choice["index"]].append(choice)
                found.append((place, [*map(said, parts)]))
                counts["whole"] += 1
                return
            left, ended = rng.randrange(1, 6) if kind == "leave" else None, False
            async for line in reply.content:
                if not line.startswith(b"data: "):
                    continue
                if line == b"data: [DONE]\n":
                    ended = True
                    break
                data = json.loads(line[6:])
                if "error" in data:
                    wrong.append(f"in a stream: {data['error']} {body}")
                    return
                for choice in data["choices"]:
                    parts[choice["index"]].append(choice)
                if left is not None and (left := left - 1) == 0:
                    counts["left"] += 1
                    reply.close()
                    return
            if not ended:
                wrong.append(f"a stream was cut off: {body}")
                return
            found.append((place, [*map(said, parts)]))
            counts["streamed"] += 1

    async def worker(number: int, session: aiohttp.ClientSession) -> None:
        rng = random.Random(seed * 1000 + number)
        while time.monotonic() < end:
            try:
                await one(session, rng)
            except (aiohttp.ClientError, OSError) as error:
                wrong.append(f"{type(error).__name__}: {error}")

    connector = aiohttp.TCPConnector(limit=0, force_close=False)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        await asyncio.gather(*(worker(i, session) for i in range(streams)))
    return {"found": found, "counts": counts, "wrong": wrong}


def said(parts: list[dict[str, Any]]) -> str:
    """The text of a choice, whole or in the parts of a stream, and then its calls as their names and arguments."""
    content, called = "", ""
    for choice in parts:
        message = {"content": choice["text"]} if "text" in choice else choice.get("message") or choice["delta"]
        content += message.get("content") or ""
        for call in message.get("tool_calls") or ():
            called += call["function"].get("name", "") + call["function"]["arguments"]
    return content + called


async def alone(port: int, sent: list[Sent], places: list[int], report: Any) -> dict[int, list[str]]:
    """The same requests, one at a time."""
    import aiohttp

    answers = {}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        for done, place in enumerate(places):
            async with session.post(f"http://127.0.0.1:{port}{sent[place].path}", json=sent[place].body) as reply:
                choices = (await reply.json())["choices"]
            answers[place] = [said([choice]) for choice in sorted(choices, key=lambda one: one["index"])]
            if done % 50 == 49:
                report(f"{done + 1} of {len(places)} run alone")
    return answers


# ---- this process


def prove(options: argparse.Namespace) -> int:
    from redraft import LLM
    from redraft.serve.config import ServeConfig
    from redraft.serve.run import server as made

    def report(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    pool = None if options.pool is None else options.pool
    llm = LLM(
        options.model,
        dtype=options.dtype,
        backend=options.backend,
        max_model_len=options.context,
        draft=options.draft,
        max_seqs=options.seqs,
    )
    if pool is None:
        pool = 2 * -(-options.context // 32)
    block = llm.runner.backend.block_bytes(llm.runner.spec)
    llm = LLM(config=llm.config.but(cache={"memory": pool * block}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = ServeConfig(port=port, max_queue=4 * options.streams, log_level="error", access_log=False)
    server = made(llm, config)
    service = server.service
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    sent = bodies(options.bodies, options.seed, options.context)
    report(
        f"{options.streams} clients for {options.seconds:g} s; {llm.engine.memory.blocks} pages, {options.seqs} texts at once,"
        f" backend {llm.runner.backend.name}"
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--client", str(port), "--out", str(out), *sys.argv[1:]]
        subprocess.run(command, check=True, env=environment | {"PYTHONPATH": os.getcwd()})
        seen = json.loads(out.read_text())
    engine, patience = llm.engine, time.monotonic() + 20
    while (engine.has_work or service.shell.busy) and time.monotonic() < patience:
        time.sleep(0.05)
    preempted = engine.preemptions
    problems = list(seen["wrong"])
    if engine.has_work or service.shell.busy:
        problems.append(f"not idle: {len(engine.running)} run, {len(engine.waiting)} wait, {service.shell.busy} are not forgotten")
    engine.memory.check()
    if engine.memory.used() or engine.outputs:
        problems.append(f"{engine.memory.used()} pages are held, {len(engine.outputs)} outputs kept")
    if not preempted:
        problems.append("nothing was preempted: the pool is too large for this proof")
    places = sorted({place for place, _ in seen["found"]})
    right = asyncio.run(alone(port, sent, places, report))
    different = Counter(place for place, texts in seen["found"] if sent[place].compared and texts != right[place])
    compared = sum(sent[place].compared for place, _ in seen["found"])
    for place in list(different)[:5]:
        texts = next(texts for at, texts in seen["found"] if at == place and texts != right[place])
        problems.append(f"another text alone, {different[place]} times: {json.dumps(sent[place].body)}: {texts} alone {right[place]}")
    server.should_exit = True
    thread.join()
    report(f"answers: {dict(seen['counts'])}")
    report(f"{compared} answers compared with the same request alone, {sum(different.values())} differ; {preempted} preemptions")
    for problem in problems:
        print(f"PROBLEM {problem}")
    print(f"{'FAILED' if problems else 'proved'}: {len(seen['found'])} answers of {len(places)} bodies, {compared} compared")
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/prove load", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--draft", default="token-recycling", help="the default drafter of the server")
    parser.add_argument("--context", type=int, default=512, help="max_model_len")
    parser.add_argument("--seqs", type=int, default=16, help="sequences that run at once")
    parser.add_argument("--pool", type=int, help="pages of the pool; default: two texts of full length")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--bodies", type=int, default=240, help="different requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client is None:
        return prove(options)
    sent = bodies(options.bodies, options.seed, options.context)
    found = asyncio.run(client(options.client, options.seconds, options.streams, options.seed, sent, options.context))
    options.out.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
