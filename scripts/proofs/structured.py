"""Structured output on a real model: every finished text matches its schema, drafts change none, and it pays.

    scripts/prove structured MODEL --requests 1000        1,000 texts under 20 schemas, with drafts and without
    scripts/prove structured MODEL --speed [--against]    tokens per second, interleaved: free, under a schema, llama-cpp-python's grammar

MODEL is a GGUF file if llama-cpp-python is to read it too. `mask` is the time for the allowed tokens of one row: their bits and their ids.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from typing import Any

TEXT, SHORT = {"type": "string", "maxLength": 80}, {"type": "string", "maxLength": 24}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _list(items: Any, most: int = 3) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most}


def _number(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


DATE = {"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9])$"}
PRICE = _object(amount={"type": "number", "minimum": 0, "maximum": 1000}, currency={"enum": ["EUR", "USD", "GBP", "JPY"]})
SCHEMAS: dict[str, dict[str, Any]] = {  # what is asked for -> its schema
    "a person": _object(name=SHORT, age=_number(0, 120), occupation=SHORT, address=_object(street=SHORT, city=SHORT, zip=SHORT)),
    "an invoice": _object(number=_number(1, 99999), date=DATE, lines=_list(_object(item=SHORT, quantity=_number(1, 99), price=PRICE))),
    "a recipe": _object(title=SHORT, minutes=_number(1, 240), ingredients=_list(SHORT, 5), steps=_list(TEXT)),
    "a weather report": _object(
        place=SHORT,
        celsius=_number(-40, 50),
        sky={"enum": ["clear", "cloudy", "rain", "snow"]},
        wind=_object(speed=_number(0, 200), from_=SHORT),
    ),
    "a movie": _object(
        title=SHORT, year=_number(1900, 2030), genres=_list({"enum": ["drama", "comedy", "action", "horror"]}), director=SHORT
    ),
    "a calendar event": _object(title=SHORT, date=DATE, hour=_number(0, 23), guests=_list(SHORT), repeats={"type": "boolean"}),
    "a book": _object(title=SHORT, author=SHORT, pages=_number(1, 2000), isbn={"type": "string", "pattern": "^97[89]-[0-9]{10}$"}),
    "a bug report": _object(
        title=TEXT, severity={"enum": ["low", "medium", "high"]}, steps=_list(TEXT), assignee={"type": ["string", "null"], "maxLength": 20}
    ),
    "a product": _object(name=SHORT, price=PRICE, in_stock={"type": "boolean"}, tags=_list(SHORT)),
    "a flight": _object(
        number={"type": "string", "pattern": "^[A-Z]{2}[0-9]{3,4}$"},
        origin={"type": "string", "pattern": "^[A-Z]{3}$"},
        destination={"type": "string", "pattern": "^[A-Z]{3}$"},
        stops=_number(0, 3),
    ),
    "a user account": _object(
        id=_number(1, 1 << 31),
        login={"type": "string", "pattern": "^[a-z][a-z0-9]{2,11}$"},
        roles=_list({"enum": ["admin", "user", "guest"]}),
    ),
    "a country": _object(name=SHORT, capital=SHORT, population=_number(1000, 2_000_000_000), languages=_list(SHORT)),
    "a review": _object(stars=_number(1, 5), summary=TEXT, recommends={"type": "boolean"}),
    "a server's configuration": _object(
        host=SHORT,
        port=_number(1, 65535),
        tls={"type": "boolean"},
        paths=_list(_object(path=SHORT, methods=_list({"enum": ["GET", "POST", "PUT"]}))),
    ),
    "a sentiment": _object(label={"enum": ["positive", "neutral", "negative"]}, score={"type": "number", "minimum": 0, "maximum": 1}),
    "a quiz question": _object(
        question=TEXT, answers={"type": "array", "items": SHORT, "minItems": 4, "maxItems": 4}, correct=_number(0, 3)
    ),
    "a to-do list": _object(title=SHORT, items=_list(_object(text=SHORT, done={"type": "boolean"}), 4)),
    "a place on a map": _object(
        name=SHORT,
        latitude={"type": "number", "minimum": -90, "maximum": 90},
        longitude={"type": "number", "minimum": -180, "maximum": 180},
    ),
    "a team": _object(name=SHORT, members=_list(_object(name=SHORT, role={"enum": ["lead", "engineer", "designer"]}), 4)),
    "a chess game": _object(
        white=SHORT,
        black=SHORT,
        result={"enum": ["1-0", "0-1", "1/2-1/2"]},
        moves=_list({"type": "string", "pattern": "^[a-h][1-8][a-h][1-8]$"}, 6),
    ),
}


def messages(what: str, i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Invent {what} and describe it as JSON. It is number {i}."}]


def params(i: int, schema: dict[str, Any] | None, tokens: int, **more: Any) -> Any:
    from redraft import SamplingParams

    outputs = {} if schema is None else {"structured_outputs": {"json": schema}}
    return SamplingParams(temperature=(0, 0.7, 1.0)[i % 3], seed=i, max_tokens=tokens, **outputs, **more)


def texts(model: str, count: int, tokens: int) -> int:
    """The number of texts that break their schema or that drafts change."""
    import jsonschema

    from redraft import LLM

    llm = LLM(model, draft="auto")
    plain = llm.sibling(draft="none")
    schemas = list(SCHEMAS.items())
    seen: Counter[str] = Counter()
    for first in range(0, count, 32):
        some = [(i, *schemas[i % len(schemas)]) for i in range(first, min(first + 32, count))]
        prompts = [{"messages": messages(what, i // len(schemas))} for i, what, _ in some]
        chosen = [params(i, schema, tokens) for i, _, schema in some]
        drafted, alone = llm.generate(prompts, chosen), plain.generate(prompts, chosen)
        for (_, _, schema), one, other in zip(some, drafted, alone, strict=True):
            text, without = one.outputs[0], other.outputs[0]
            seen["texts"] += 1
            seen["changed by drafts"] += text.token_ids != without.token_ids
            seen["finished"] += text.finish_reason == "stop"
            if text.finish_reason == "stop":
                seen["invalid"] += not jsonschema.Draft202012Validator(schema).is_valid(json.loads(text.text))
            seen["tokens"] += len(text.token_ids)
            seen["steps"] += text.stats.steps
            checked, kept = text.stats.by_drafter.get("grammar", (0, 0))
            seen["forced tokens drafted"] += checked
            seen["forced tokens kept"] += kept
            seen["drafts kept"] += text.stats.accepted
        print(f"\r{seen['texts']}/{count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for name in (
        "texts",
        "finished",
        "invalid",
        "changed by drafts",
        "tokens",
        "steps",
        "drafts kept",
        "forced tokens drafted",
        "forced tokens kept",
    ):
        print(f"{name:24}{seen[name]:8}")
    return seen["invalid"] + seen["changed by drafts"]


Timed = tuple[int, float, int, float]  # tokens and seconds of a request, and of the part after its first step


def speed(model: str, rounds: int, tokens: int, *, against: bool, cold: bool) -> None:
    """Every round asks for other texts. What the drafters learn from a way stays with it; with `cold` they forget it after a round."""
    from redraft import LLM

    llm = LLM(model, draft="auto")
    plain = llm.sibling(draft="none")
    drafter, fresh = llm.engine.drafter, llm.engine.drafter.snapshot()
    peer = _peer(model) if against else None
    schemas = list(SCHEMAS.items())

    def ours(engine: Any, i: int, schema: Any) -> Timed:
        began = time.perf_counter()
        pieces = engine.stream({"messages": messages(schemas[i % len(schemas)][0], i)}, params(i, schema, tokens))
        first = len(next(pieces).token_ids)
        reading = time.perf_counter() - began
        later = sum(len(piece.token_ids) for piece in pieces)
        seconds = time.perf_counter() - began
        return first + later, seconds, later, seconds - reading

    def theirs(i: int, schema: Any) -> Timed:
        began = time.perf_counter()
        form = None if schema is None else {"type": "json_object", "schema": schema}
        found = peer.create_chat_completion(
            messages(schemas[i % len(schemas)][0], i),
            max_tokens=tokens,
            temperature=params(i, None, 1).temperature,
            seed=i,
            response_format=form,
        )
        count, seconds = found["usage"]["completion_tokens"], time.perf_counter() - began
        return count, seconds, count, seconds

    ways: dict[str, Any] = {
        "free, plain loop": lambda i: ours(plain, i, None),
        "free, auto": lambda i: ours(llm, i, None),
        "schema, plain loop": lambda i: ours(plain, i, schemas[i % len(schemas)][1]),
        "schema, auto": lambda i: ours(llm, i, schemas[i % len(schemas)][1]),
    }
    if peer is not None:
        ways |= {"free, llama.cpp": lambda i: theirs(i, None), "schema, llama.cpp": lambda i: theirs(i, schemas[i % len(schemas)][1])}
    rates, alone = {name: list[float]() for name in ways}, {name: list[float]() for name in ways}
    for way in ways.values():  # reads prompts and grammars once
        for i in range(2):
            way(i)
    memory = dict.fromkeys(ways, fresh)
    for turn in range(rounds):
        for name in [*ways][turn % len(ways) :] + [*ways][: turn % len(ways)]:
            drafter.restore(fresh if cold else memory[name])
            texts = range(turn * len(schemas), (turn + 1) * len(schemas))
            counts, seconds, later, generating = map(sum, zip(*(ways[name](i) for i in texts), strict=True))
            memory[name] = drafter.snapshot()
            rates[name].append(counts / seconds)
            alone[name].append(later / generating)
            print(f"round {turn + 1}  {name:22}{rates[name][-1]:8.1f} tokens/s", file=sys.stderr)
    for name, found in rates.items():
        print(f"{name:22}{statistics.median(found):8.1f} tokens/s   {min(found):.1f} to {max(found):.1f}")
    pairs = [
        ("schema, auto", "free, auto"),
        ("schema, auto", "free, plain loop"),
        ("schema, auto", "schema, plain loop"),
        ("schema, auto", "schema, llama.cpp"),
    ]
    for one, other in pairs:
        if other in rates:
            for what, found in (("", rates), ("generation alone", alone)):
                if what and "llama.cpp" in other:
                    continue  # it was not streamed
                ratios = [a / b for a, b in zip(found[one], found[other], strict=True)]
                print(f"{one} / {other:22}{statistics.median(ratios):6.2f}   {min(ratios):.2f} to {max(ratios):.2f}   {what}")
    _masks(llm, tokens)


def _masks(llm: Any, tokens: int) -> None:
    """Times the mask of every token of some texts."""
    import numpy as np

    from redraft.core.testing import sequence
    from redraft.sample.processors.processor import Row

    sampler, times = llm.engine.sampler, []
    for i, (what, schema) in enumerate(SCHEMAS.items()):
        chosen = params(3 * i, schema, tokens)
        (output,) = llm.generate({"messages": messages(what, i)}, chosen)
        ids = output.outputs[0].token_ids
        seq = sequence([1], stored=0, prompt_len=1, temperature=1, structured_outputs=chosen.structured_outputs)
        seq.state[sampler] = sampler.check(seq.params)
        (processor,) = (one for one in seq.state[sampler] if hasattr(one, "matcher"))
        for token in ids:
            row = Row(sampler.ids, np.zeros(len(sampler.ids)), seq, [])
            processor.allows(seq, [], token)  # moves the state
            began = time.perf_counter()
            bits = np.unpackbits(processor._allowed(seq, []), bitorder="little").view(bool)
            np.flatnonzero(bits[: len(row.ids)])
            times.append(1e6 * (time.perf_counter() - began))
            seq.tokens.append(token)
    times.sort()
    most = times[int(0.99 * len(times))]
    print(f"mask: {statistics.median(times):.0f} us, mean {statistics.fmean(times):.0f}, 99 % {most:.0f}, {len(sampler.ids)} tokens")


def _peer(model: str) -> Any:
    import llama_cpp

    return llama_cpp.Llama(model, n_ctx=2048, verbose=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="prove structured", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=160, help="at most, of a text")
    parser.add_argument("--speed", action="store_true", help="measure, instead of checking texts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", action="store_true", help="llama-cpp-python too")
    parser.add_argument("--cold", action="store_true", help="drafters forget what they learned after each round")
    given = parser.parse_args()
    if given.speed:
        speed(given.model, given.rounds, given.tokens, against=given.against, cold=given.cold)
    else:
        sys.exit(bool(texts(given.model, given.requests, given.tokens)))


if __name__ == "__main__":
    main()
