"""What PIE saves and costs: ten kinds of edits of a long text, compared with computing the edited text anew.

A text is in the cache, it is edited, and the first new token is measured. For each kind of edit the proof reports the tokens computed
by PIE, by the prefix cache alone and without either; the time to the first token as a ratio to the latter two; the Kullback-Leibler
divergence of the next token's distribution from the exact one, with keys turned to their new places and at their old places ("no
turn"); and how many of the next greedy tokens are the same. Each number is a mean over texts, with its spread. The paper claims more
than 85 % less time than a full recomputation.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from redraft import LLM, SamplingParams
from redraft.core.sequence import Request
from redraft.engine.output import checked
from redraft.kv.store import Store

PILOT = Path(__file__).resolve().parents[3] / "shared" / "models" / "pilot-16m"
FILES = ("tarfile", "argparse", "mailbox", "inspect", "turtle", "typing")
Ids = list[int]
Edit = Callable[[Ids, list[int], Random], Ids]


def _new(pool: list[int], count: int, dice: Random) -> Ids:
    at = dice.randrange(len(pool) - count)
    return pool[at : at + count]


def insert(share: float, count: int) -> Edit:
    return lambda ids, pool, dice: ids[: (at := int(share * len(ids)))] + _new(pool, count, dice) + ids[at:]


def delete(share: float, count: int) -> Edit:
    return lambda ids, pool, dice: ids[: (at := int(share * len(ids)))] + ids[at + count :]


def replace(share: float, gone: int, count: int) -> Edit:
    return lambda ids, pool, dice: ids[: (at := int(share * len(ids)))] + _new(pool, count, dice) + ids[at + gone :]


def several(ids: Ids, pool: list[int], dice: Random) -> Ids:
    """Three edits: an insertion, a deletion and a replacement."""
    return insert(0.2, 12)(delete(0.5, 12)(replace(0.8, 8, 12)(ids, pool, dice), pool, dice), pool, dice)


KINDS: dict[str, Edit] = {
    "insert a token in the middle": insert(0.5, 1),
    "insert a line in the middle": insert(0.5, 12),
    "insert 100 tokens in the middle": insert(0.5, 100),
    "insert a line at the start": insert(0.02, 12),
    "insert a line near the end": insert(0.95, 12),
    "delete a line in the middle": delete(0.5, 12),
    "delete 100 tokens in the middle": delete(0.5, 100),
    "replace a token by another": replace(0.5, 1, 1),
    "replace a line by a longer one": replace(0.5, 12, 24),
    "three edits": several,
}


def distribution(llm: LLM, request: Request) -> tuple[np.ndarray, Ids, float, Request]:
    """Log-probabilities of the first new token over all tokens, the greedy text, and the seconds to the first token."""
    engine = llm.engine
    engine.add(request)
    began, first, rows, text = time.perf_counter(), 0.0, [], []
    while engine.has_work:
        for event in checked(engine.step()):
            first = first or time.perf_counter() - began
            rows += event.logprobs
            text += event.tokens
    logs = np.full(llm.runner.spec.vocab, -30.0)
    for token, value in rows[0].top:
        logs[token] = value
    return logs, text, first, request


def divergence(exact: np.ndarray, other: np.ndarray) -> float:
    return float((np.exp(exact) * (exact - other)).sum())


def main() -> int:
    parser = argparse.ArgumentParser(prog="prove pie", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PILOT) if PILOT.exists() else "embedded")
    parser.add_argument("--length", type=int, default=1900, help="tokens of a text, at most those of the context")
    parser.add_argument("--tokens", type=int, default=16, help="greedy tokens to compare")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--files", nargs="+", default=FILES, help="modules of the standard library")
    options = parser.parse_args()

    kept = LLM(options.model, dtype=options.dtype, threads=options.threads, token_budget=2048)
    fresh = LLM(options.model, dtype=options.dtype, threads=options.threads, token_budget=2048, prefix_sharing=False)
    length = min(options.length, kept.max_model_len - options.tokens - 120)
    library = Path(sysconfig.get_path("stdlib"))
    texts = [kept.tokenizer.encode((library / f"{name}.py").read_text(encoding="utf-8")) for name in options.files]
    texts = [ids for ids in texts if len(ids) > 2 * length]
    vocab = kept.runner.spec.vocab
    # the top 1024 have nearly all of the mass; each missing token counts as exp(-30)
    params = SamplingParams(temperature=0, max_tokens=options.tokens, logprobs=min(vocab, 1024), ignore_eos=True, seed=0)
    reuse = "pie:shortest=8"

    table = Table(title=f"{options.model}, {options.dtype}: {len(texts)} texts of {length} tokens", box=None)
    for heading in ("edit", "computed", "prefix only", "TTFT / prefix", "TTFT / nothing", "saved", "KL", "KL, no turn", "same tokens"):
        table.add_column(heading, justify="left" if heading == "edit" else "right")
    move, numbers = Store.move, itertools.count()
    everything = []
    for number, (kind, edit) in enumerate(KINDS.items()):
        found = []
        for i, ids in enumerate(texts):
            print(f"\r{kind}: {i + 1}/{len(texts)}\033[K", end="", file=sys.stderr, flush=True)
            old, pool = ids[:length], ids[length:]
            new = edit(old, pool, Random(1000 * number + i))[: kept.max_model_len - options.tokens]

            def once(name: str, before: Ids, old: Ids = old, new: Ids = new) -> tuple[np.ndarray, Ids, float, Request]:
                """Caches the old text for a tenant of its own, then runs the new text."""
                tenant = str(next(numbers))
                distribution(kept, Request("old", list(old), params.but(max_tokens=1), tenant))
                return distribution(kept, Request(name, list(new), params, tenant, before=list(before), reuse=reuse if before else ""))

            exact, text, alone, _ = distribution(fresh, Request("exact", list(new), params))
            rounds = [(once("pie", old), once("prefix", [])) for _ in range(3)]  # interleaved
            pie, prefix = rounds[0]
            Store.move = lambda store, moves: move(store, [one._replace(delta=0) for one in moves])  # type: ignore[method-assign]
            unturned = once("no turn", old)
            Store.move = move  # type: ignore[method-assign]
            computed = len(new) - (pie[3].cached_tokens or 0) - pie[3].reused_tokens
            mine, theirs = median(one[0][2] for one in rounds), median(one[1][2] for one in rounds)
            same = next((j for j, (a, b) in enumerate(zip(pie[1], text, strict=True)) if a != b), len(text)) / len(text)
            found.append(
                (computed, len(new) - (prefix[3].cached_tokens or 0), mine / theirs, mine / alone, 1 - mine / alone,
                 divergence(exact, pie[0]), divergence(exact, unturned[0]), same)
            )  # fmt: skip
        values = np.array(found)
        everything.append(values)
        mean, low, high = values.mean(0), values.min(0), values.max(0)
        ratios = [f"{mean[k]:.2f} ({low[k]:.2f}-{high[k]:.2f})" for k in (2, 3)]
        distributions = [f"{mean[k]:.1e}" for k in (5, 6)]
        table.add_row(kind, f"{mean[0]:.0f}", f"{mean[1]:.0f}", *ratios, f"{mean[4]:.0%}", *distributions, f"{mean[7]:.0%}")
    print("\r\033[K", end="", file=sys.stderr)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    whole = np.concatenate(everything)
    saved = np.quantile(whole[:, 4], [0, 0.5, 1])
    rows = 1 - whole[:, 0] / length
    word = "confirmed" if np.mean(whole[:, 4]) > 0.85 else "not confirmed"
    console.print(
        f"time saved against computing all: median {saved[1]:.0%} ({saved[0]:.0%} to {saved[2]:.0%}); more than 85 % on average: {word}"
    )
    console.print(f"tokens saved against computing all: mean {rows.mean():.1%} (least {rows.min():.1%})")
    console.print(f"mean KL(exact || PIE) {whole[:, 5].mean():.1e}, without the turn {whole[:, 6].mean():.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
