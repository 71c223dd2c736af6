"""What ADED gains on a real model: over a session, by adapting its weights, by searching.

A session is a file of the standard library, cut into consecutive pieces. Each request continues one piece. The plain loop makes the
texts once, in float64. Under `coupled` no drafter changes a token, so each variant is replayed over these texts, request after
request: its tree at every position is followed as far as the text goes. The first requests also run in the engine, which must give the
same texts in the same number of forward passes.

1. A request gains more late in a session than early in it. Each request of the outer thirds is measured at both ends, once in the
   order of the file and once in the reverse order, so it is compared with itself.
2. Adaptive weights are better than the same table unchanged (increment 0), which was counted on other files of the library.
3. The search is better than the 24 likeliest paths by product of weights, on at least one file. The same is tested for products of
   shares, which are weights divided by the sum of their pair's weights.

Intervals are bootstraps over requests, in claim 3 corrected for the number of files. A claim is confirmed if its interval lies above
0, and refuted if it lies below.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from heapq import nlargest
from pathlib import Path
from typing import Any

import numpy as np

from redraft import LLM, SamplingParams
from redraft.core.noise import sample_seed
from redraft.core.plan import Budget
from redraft.core.testing import sequence
from redraft.draft.aded import ADED, Pair, TriGrams

PILOT = Path(__file__).resolve().parents[3] / "shared" / "models" / "pilot-16m"
LIBRARY = Path(sysconfig.get_path("stdlib"))
FILES = ("argparse", "tarfile", "_pydecimal", "typing", "turtle", "mailbox", "inspect", "subprocess")
DRAWS = 4000
LEVEL = 0.05

Sequences = tuple[list[int], list[int]]


class LikeliestPaths(TriGrams):
    """Replaces the search: all paths, ranked by the product of their weights. The prefixes of a path are included."""

    def factor(self, weight: float, total: float) -> float:
        return weight

    def search(self, root: Pair, noise: Iterator[float]) -> tuple[list[int], list[int], list[int]]:
        pairs, parents, products, lengths = [root], [0], [1.0], [1]
        for node, (u, v) in enumerate(pairs):  # the list grows during the loop
            row = self.table.get((u, v), {}) if lengths[node] < self.method.length else {}
            total = sum(row.values())
            for w, weight in row.items():
                pairs.append((v, w))
                parents.append(node)
                products.append(products[node] * self.factor(weight, total))
                lengths.append(lengths[node] + 1)
        for node in range(len(pairs) - 1, 0, -1):
            products[parents[node]] = max(products[parents[node]], products[node])
        ranks: list[Any] = products  # in the order of visits
        return [v for _, v in pairs], parents, ranks


class LikeliestShares(LikeliestPaths):
    def factor(self, weight: float, total: float) -> float:
        return weight / total


class CutByLengths(TriGrams):
    """The rule of the authors' release, with `rows` in place of its 64: drops the longest sequences until the sum of lengths fits."""

    rows = 64

    def extract(self, root: Pair, tokens: list[int], parents: list[int], visits: list[int]) -> Sequences:
        ways: dict[int, tuple[int, ...]] = {0: ()}
        found: dict[tuple[int, ...], None] = {}
        for node in nlargest(self.method.sequences, range(len(tokens)), key=visits.__getitem__):
            ways[node] = (*ways[parents[node]], tokens[node]) if node else ()
            row = self.table.get((tokens[parents[node]], tokens[node]) if node else root)
            found[(*ways[node], max(row, key=row.__getitem__)) if row else ways[node]] = None
        kept = [way for way in found if way]
        while sum(len(set(way)) for way in kept) > self.rows:
            kept.remove(max(kept, key=lambda way: len(set(way))))
        levels = [way[:depth] for depth in range(1, self.method.length + 1) for way in kept if len(way) >= depth]
        place = {(): -1, **{way: i for i, way in enumerate(dict.fromkeys(levels))}}
        return [way[-1] for way in place if way], [place[way[:-1]] for way in place if way]


@dataclass(frozen=True)
class Variant:
    """filled: starts with the table of the corpus; backwards: the last request first; fresh: each request starts with the first table."""

    kind: type[TriGrams] = TriGrams
    filled: bool = False
    increment: float = ADED.increment
    backwards: bool = False
    fresh: bool = False


EMPTY, FILLED = Variant(), Variant(filled=True)
STATIC = replace(FILLED, increment=0.0)
VARIANTS = {
    "empty": EMPTY,
    "empty, backwards": replace(EMPTY, backwards=True),
    "empty before each request": replace(EMPTY, fresh=True),
    "empty, likeliest by weights": replace(EMPTY, kind=LikeliestPaths),
    "empty, likeliest by shares": replace(EMPTY, kind=LikeliestShares),
    "filled": FILLED,
    "filled, backwards": replace(FILLED, backwards=True),
    "filled, static": STATIC,
    "filled, likeliest by weights": replace(FILLED, kind=LikeliestPaths),
    "filled, likeliest by shares": replace(FILLED, kind=LikeliestShares),
    "filled, the release's cut": replace(FILLED, kind=CutByLengths),
}


@dataclass(frozen=True)
class Continuation:
    """A request and the text of the model."""

    prompt: list[int]
    params: SamplingParams
    text: list[int]


@dataclass
class Run:
    """One variant over all sessions. forwards: i64[sessions, requests], requests in the order of the file."""

    forwards: Any
    proposals: int = 0
    seconds: float = 0.0
    nodes: int = 0

    def replay(self, drafter: TriGrams, one: Continuation, rows: int) -> int:
        """Forward passes that drew a token, including the prompt's, as Stats.steps counts them."""
        whole = one.prompt + one.text
        seq = sequence(whole[: len(one.prompt) + 1], seed=one.params.seed)
        forwards = 1
        while (at := len(seq.tokens)) < len(whole):
            began = time.process_time()
            (tree,) = drafter.propose([seq], [Budget(rows, len(whole) - 1 - at)])
            self.seconds += time.process_time() - began
            self.proposals += 1
            self.nodes += len(tree)
            node = -1
            while (node := tree.child(node, whole[at])) >= 0:
                at += 1
            seq.tokens = whole[: at + 1]
            forwards += 1
        return forwards


def say(what: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {what}", file=sys.stderr, flush=True)


def read(name: str) -> str:
    path = Path(name) if Path(name).suffix else LIBRARY / f"{name}.py"
    return path.read_text(encoding="utf-8")


def write(llm: LLM, options: argparse.Namespace, temperature: float) -> list[list[Continuation]]:
    """The sessions: a list of requests for each file."""
    sessions = []
    for number, name in enumerate(options.files):
        ids = llm.tokenizer.encode(read(name))
        if len(ids) < options.requests * options.prompt:
            sys.exit(f"{name}: its {len(ids)} tokens are not {options.requests} prompts of {options.prompt}")
        prompts = [ids[i * options.prompt : (i + 1) * options.prompt] for i in range(options.requests)]
        fixed: dict[str, Any] = {"temperature": temperature, "max_tokens": options.tokens, "ignore_eos": True}
        seeds = [sample_seed(options.seed, number * options.requests + i) for i in range(options.requests)]
        params = [SamplingParams(**fixed, seed=seed) for seed in seeds]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        texts = [output.outputs[0].token_ids for output in outputs]
        sessions.append([Continuation(*one) for one in zip(prompts, params, texts, strict=True)])
        say(f"temperature {temperature:g}: {name} has its {options.requests} texts")
    return sessions


def run(variant: Variant, sessions: list[list[Continuation]], corpus: list[list[int]], vocab: int, rows: int) -> Run:
    drafter = variant.kind(ADED(increment=variant.increment), vocab)
    if isinstance(drafter, CutByLengths):
        drafter.rows = rows
    if variant.filled:
        drafter.prefill(corpus)
    start = drafter.snapshot()
    found = Run(np.zeros((len(sessions), len(sessions[0])), np.int64))
    for s, requests in enumerate(sessions):
        drafter.restore(start)
        for i in sorted(range(len(requests)), reverse=variant.backwards):
            if variant.fresh:
                drafter.restore(start)
            found.forwards[s, i] = found.replay(drafter, requests[i], rows)
    return found


def engine_differs(llm: LLM, requests: list[Continuation], forwards: list[int], rows: int) -> int:
    """The number of requests for which the engine needs other forward passes or produces another text than the replay."""
    engine, differ = llm.sibling(draft="aded", draft_rows=rows, draft_total=rows), 0
    for i, (one, expected) in enumerate(zip(requests, forwards, strict=False)):
        out = engine.generate({"prompt_token_ids": one.prompt}, one.params)[0].outputs[0]
        if (out.token_ids, out.stats.steps, out.stats.fault) != (one.text, expected, ""):
            say(f"request {i}: {out.stats.steps} forwards in the engine, {expected} replayed, fault {out.stats.fault!r}")
            differ += 1
    return differ


def interval(values: Any, level: float = LEVEL) -> tuple[float, float]:
    low, high = np.quantile(values, [level / 2, 1 - level / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Statistics:
    """Tokens per forward pass. All variants use the same resampled requests."""

    tokens: int
    picks: Any  # i64[draws, requests]

    @classmethod
    def of(cls, requests: int, tokens: int) -> Statistics:
        return cls(tokens, np.random.default_rng(0).integers(requests, size=(DRAWS, requests)))

    def rate(self, forwards: Any) -> tuple[float, Any]:
        """The measured rate, and the rates of the resamples."""
        flat = forwards.ravel()
        return self.tokens * flat.size / flat.sum(), self.tokens * flat.size / flat[self.picks].sum(axis=1)

    def difference(self, better: Any, worse: Any, level: float = LEVEL) -> tuple[float, float, float]:
        """The difference of two rates of the same requests: measured, lower bound, upper bound."""
        (a, many_a), (b, many_b) = self.rate(better), self.rate(worse)
        return (a - b, *interval(many_a - many_b, level))


def verdict(low: float, high: float) -> str:
    return "CONFIRMED" if low > 0 else "REFUTED" if high < 0 else "NOT CONFIRMED, 0 is not excluded"


def show(runs: dict[str, Run], tokens: int) -> None:
    shape = runs["empty"].forwards.shape
    third = max(1, shape[1] // 3)
    parts = {"all": slice(None), "first third": slice(third), "last third": slice(-third, None)}
    print(f"{'tokens per forward (95 % interval)':32}" + "".join(f"{part:>24}" for part in parts) + "   nodes  CPU ms a proposal")
    for name, found in runs.items():
        cells = ""
        for part in parts.values():
            forwards = found.forwards[:, part]
            rate, many = Statistics.of(forwards.size, tokens).rate(forwards)
            cells += f"{rate:9.3f} ({interval(many)[0]:.3f}-{interval(many)[1]:.3f})"
        print(f"{name:32}{cells}{found.nodes / found.proposals:8.1f}{1000 * found.seconds / found.proposals:19.2f}")


def judge(runs: dict[str, Run], options: argparse.Namespace) -> None:
    sessions, requests = runs["empty"].forwards.shape
    every = Statistics.of(sessions * requests, options.tokens)

    third = requests // 3
    if third:
        ends = Statistics.of(2 * sessions * third, options.tokens)
        for start in ("empty", "filled"):
            ahead, back = runs[start].forwards, runs[f"{start}, backwards"].forwards
            early = np.concatenate([ahead[:, :third], back[:, -third:]])
            late = np.concatenate([back[:, :third], ahead[:, -third:]])
            found, low, high = ends.difference(late, early)
            print(f"1. late - early in a session, {start} start: {found:+.3f} ({low:+.3f} to {high:+.3f}): {verdict(low, high)}")
    found, low, high = every.difference(runs["filled"].forwards, runs["filled, static"].forwards)
    print(f"2. adaptive - static, filled start: {found:+.3f} ({low:+.3f} to {high:+.3f}): {verdict(low, high)}")
    each = Statistics.of(requests, options.tokens)
    for start in ("empty", "filled"):
        for rival in ("weights", "shares"):
            search, other = runs[start].forwards, runs[f"{start}, likeliest by {rival}"].forwards
            found, low, high = every.difference(search, other)
            tasks = {name: each.difference(search[s], other[s], LEVEL / sessions) for s, name in enumerate(options.files)}
            better = [f"{name} ({task[0]:+.3f})" for name, task in tasks.items() if task[1] > 0]
            word = verdict(max(task[1] for task in tasks.values()), max(task[2] for task in tasks.values()))
            print(f"3. search - likeliest paths by {rival}, {start} start: on all {found:+.3f} ({low:+.3f} to {high:+.3f}); ", end="")
            print(f"above on at least one file: {word}{': ' + ', '.join(better) if better else ''}")
    found, low, high = every.difference(runs["filled"].forwards, runs["filled, the release's cut"].forwards)
    print(f"Also: cut by visits - the release's cut, filled start: {found:+.3f} ({low:+.3f} to {high:+.3f}): {verdict(low, high)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PILOT) if PILOT.exists() else "embedded")
    parser.add_argument("--files", nargs="+", default=FILES, help="modules of the standard library, or paths")
    parser.add_argument("--requests", type=int, default=30, help="requests per file")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens per text")
    parser.add_argument("--rows", type=int, default=16, help="nodes of a draft")
    parser.add_argument("--corpus", type=int, default=300_000, help="tokens of other files from which the filled table is made")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--engine", type=int, default=10, help="requests that also run in the engine, per temperature")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch; its default if not given")
    options = parser.parse_args()

    llm = LLM(options.model, dtype="float64", threads=options.threads, max_seqs=8)
    vocab, corpus = llm.runner.spec.vocab, []
    for path in sorted(LIBRARY.glob("*.py")):
        if path.stem not in options.files and sum(map(len, corpus)) < options.corpus:
            corpus.append(llm.tokenizer.encode(path.read_text(encoding="utf-8")))
    say(f"corpus: {len(corpus)} files, {sum(map(len, corpus))} tokens")

    differ = 0
    for temperature in options.temperature:
        sessions, runs = write(llm, options, temperature), {}
        for name, variant in VARIANTS.items():
            runs[name] = run(variant, sessions, corpus, vocab, options.rows)
            say(f"temperature {temperature:g}: replayed {name}")
        many = f"{len(sessions)} files of {options.requests} requests, {options.prompt} + {options.tokens} tokens"
        print(f"\n{options.model}, temperature {temperature:g}, drafts of at most {options.rows} nodes, {many}")
        show(runs, options.tokens)
        judge(runs, options)
        checked = sessions[0][: options.engine]
        wrong = engine_differs(llm, checked, runs["empty"].forwards[0].tolist(), options.rows)
        print(f"The engine agrees with the replay, text and forwards, on {len(checked) - wrong} of {len(checked)} requests.", flush=True)
        differ += wrong
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
