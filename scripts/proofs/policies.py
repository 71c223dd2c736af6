"""Same seed, same text under cache policies, natively, in the model's own dtype, on a real model.

Each text runs alone, one row a step behind its prompt, without drafts. Then all texts of all policies, and as many without a policy, run
together: with drafts, in chunks, with shared prefixes, in a pool so small that texts are preempted. Every token is compared. The run fails
if a token differs, if a policy's texts had no accepted draft, if nothing was preempted, or if memory is not whole at the end.
"""

from __future__ import annotations

import argparse
import random
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any

from redraft import LLM, SamplingParams
from redraft.core.sequence import Request
from redraft.engine.budgets import Policy, registered
from redraft.engine.output import checked
from redraft.errors import RedraftError

FILES = "argparse", "typing", "inspect", "tarfile", "zipfile", "pickle"
NONE = "none"


def prompts(llm: LLM, count: int, length: int, dice: random.Random) -> list[list[int]]:
    """Pieces of Python's library. Every second prompt begins like the one before it."""
    texts = [llm.tokenizer.encode(Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text()) for name in FILES]
    found: list[list[int]] = []
    for i in range(count):
        text = dice.choice(texts)
        at = dice.randrange(len(text) - length)
        own = text[at : at + dice.randint(length // 2, length)]
        found.append([*found[-1][: length // 3], *own[length // 3 :]] if i % 2 else own)
    return found


def run(llm: LLM, asked: list[Request], together: bool) -> tuple[dict[str, list[int]], Counter[str]]:
    """The texts by request, and how many drafted tokens were accepted, by request."""
    texts: dict[str, list[int]] = {request.id: [] for request in asked}
    accepted: Counter[str] = Counter()
    waiting = list(asked)
    while waiting or llm.engine.has_work:
        while waiting and (together or not llm.engine.has_work):
            llm.engine.add(waiting.pop(0))
        for event in checked(llm.engine.step()):
            assert event.error is None, f"{event.request.id}: {event.error!r}"
            texts[event.request.id] += event.tokens
            accepted[event.request.id] += max(0, len(event.tokens) - 1)
    llm.engine.memory.check()
    assert not llm.engine.memory.used(), "blocks are left"
    return texts, accepted


def main() -> None:
    parser = argparse.ArgumentParser(prog="prove policies", description=__doc__)
    parser.add_argument("model", help="a folder or a GGUF file")
    parser.add_argument("--policy", action="append", default=[], help="seam=name:option=..., with {tokens} and the like for the budget")
    parser.add_argument("--budget", type=float, default=25.0, help="percent of a prompt's tokens")
    parser.add_argument("--texts", type=int, default=4, help="of each policy")
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--length", type=int, default=700, help="tokens of the longest prompt")
    parser.add_argument("--draft", default="token-recycling")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    room: dict[str, Any] = {"max_model_len": args.length + args.tokens + 8}
    alone = LLM(args.model, draft="none", max_seqs=1, prefix_sharing=False, **room)
    blocks = 3 * -(-room["max_model_len"] // 32)
    pool = blocks * alone.runner.backend.block_bytes(alone.runner.spec)
    mixed = LLM(args.model, draft=args.draft, max_seqs=12, token_budget=160, cache_memory=pool, **room)
    dice = random.Random(args.seed)
    policies: dict[str, dict[str, str]] = {NONE: {}}
    for policy in [Policy.of(text) for text in args.policy] or registered():
        try:
            params = policy.at(args.budget, args.length)
            alone.engine.policies.check(SamplingParams(**params))
            policies[policy.name] = params
        except RedraftError as error:
            print(f"{policy.name}: left out: {error}")
    asked: dict[str, Request] = {}
    texts = prompts(alone, args.texts * len(policies), args.length, dice)
    for i, (name, params) in enumerate((name, params) for _ in range(args.texts) for name, params in policies.items()):
        sampled = SamplingParams(temperature=dice.choice([0, 0.8]), seed=i, max_tokens=args.tokens, ignore_eos=True, **params)
        asked[f"{name} {i}"] = Request(f"{name} {i}", texts[i], sampled)
    began = time.perf_counter()
    expected, _ = run(alone, list(asked.values()), together=False)
    again = [Request(name, list(request.prompt), request.params) for name, request in asked.items()]
    dice.shuffle(again)
    found, accepted = run(mixed, again, together=True)
    wrong, idle = 0, []
    print(f"{'policy':<24}{'tokens':>8}{'differ':>8}{'accepted drafts':>17}")
    for name in policies:
        mine = [one for one in asked if one.rpartition(" ")[0] == name]
        differ = sum(a != b for one in mine for a, b in zip(expected[one], found[one], strict=True))
        drafts = sum(accepted[one] for one in mine)
        print(f"{name:<24}{sum(len(expected[one]) for one in mine):>8,}{differ:>8}{drafts:>17}")
        wrong += differ
        idle += [] if drafts else [name]
    total = sum(map(len, expected.values()))
    preempted = mixed.engine.preemptions
    print(f"{total:,} tokens, {wrong} differ; {preempted} preemptions; {time.perf_counter() - began:.0f} s")
    if wrong or not preempted or idle:
        sys.exit(f"failed: {wrong} tokens differ, {preempted} preemptions, no accepted drafts: {', '.join(idle) or 'nowhere'}")


if __name__ == "__main__":
    main()
