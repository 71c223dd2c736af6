"""Far keys at one distance: InfLLM's blocks on a needle and beyond the trained length, probe queries of ActQKV, and A2ATS's codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np

import redraft
from redraft.bench import cache
from redraft.bench.tasks import Answer, Probe, Task, pieces, sources
from redraft.kv.sparse_attention import a2ats
from redraft.kv.sparse_attention.a2ats import A2ATS, Codebooks
from redraft.llm import LLM
from redraft.models import calibration
from redraft.ops.arrays import array, turned, widened
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab

LENGTH, BLOCK, CHUNK = 512, 32, 256  # tokens
BLOCKS = f"infllm:tokens=256,local=96,sinks=32,block={BLOCK}"
STREAM = {"keep": "streaming-llm:sinks=32,recent=224"}
DISTANCE = 300  # of far keys, within the texts
LONG, LAST = 2304, 256  # tokens of a text for a model of 1,024, and those at its end that are scored
NATS = "nats a token of the answer"
SMALL = f"a needle in {LENGTH} tokens at five depths; 256 are read, 96 of them local"


def needle(lab: Lab) -> Task:
    return lab.tasks(LENGTH, 5)["needle"]


def blocks(options: str = "") -> dict[str, str]:
    return {"read": BLOCKS + (options and f",{options}")}


def against(one: dict[str, str], other: dict[str, str]) -> Callable[[Lab], Found]:
    """A run whose number is what a text keeps under one policy beyond another."""

    def run(lab: Lab) -> Found:
        a, b = lab.nats(needle(lab), **one), lab.nats(needle(lab), **other)
        right = ", ".join(f"{lab.scores(needle(lab), **policy).right.mean():.0%}" for policy in ({}, one, other))
        return Found(a - b, [f"against the full cache {a.mean():+.2f}, the other {b.mean():+.2f}; right, full cache first: {right}"])

    return run


def longer(lab: Lab) -> LLM:
    """The model in the package, with a context beyond the trained one."""
    folder = lab.folder / "long"
    if not folder.exists():
        shutil.copytree(f"{redraft.__path__[0]}/embedded/target", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    return lab.load(str(folder), dtype="float32", max_seqs=4)


def beyond(lab: Lab) -> Found:
    llm = longer(lab)
    texts = [llm.tokenizer.encode(text, special=False) for text in sources([])["standard library"]]
    probes = [Probe(i, ids, LONG - LAST, (Answer(0, LONG - LAST, LONG),)) for i, ids in enumerate(pieces(texts, LONG, lab.count(6)))]
    task = Task("beyond the trained length", ("end",), probes, [])
    policies: tuple[dict[str, str], ...] = (
        {},
        {"read": "infllm:tokens=512,local=256,sinks=32,block=32"},
        {"read": "infllm:tokens=4000,local=256,sinks=32,block=32"},
        {"keep": "streaming-llm:sinks=32,recent=480"},
    )
    full, some, every, stream = (
        cache.score(llm, task, probes, cache.PolicyAtBudget(str(one), None, None, one), 4, lambda what: None).logprobs[:, 0]
        for one in policies
    )
    changes = ", ".join(f"{name} {(one - full).mean():+.3f}" for name, one in (("all blocks", every), ("the first and newest", stream)))
    return Found(some - full, [f"the full cache {full.mean():.3f}; the change with {changes}"])


def probes(lab: Lab) -> Found:
    """In each layer, whether the block of the fact is among the two best for the queries of a chunk that ends with the question."""
    task = lab.tasks(2 * LENGTH, 6)["needle"]
    ways: dict[str, list[float]] = {"probe": [], "mean": [], "last": []}
    for probe in task.probes[2 :: len(task.places)]:
        first, last = probe.answers[0].first, probe.answers[0].last
        answer, ids = probe.ids[first:last], probe.ids[:first]
        fact = next(i for i in range(len(ids)) if ids[i : i + len(answer)] == answer)
        count = (len(ids) - CHUNK) // BLOCK
        found: dict[str, list[bool]] = {name: [] for name in ways}

        def add(index: int, layer: Any, q: Any, k: Any, v: Any) -> None:
            at = np.arange(len(ids))  # noqa: B023
            rows, keys = (widened(array(x)).swapaxes(0, 1).astype(np.float64) for x in (q, k))
            rows = turned(rows, layer.rotary.frequencies, CHUNK - at)[:, -CHUNK:]
            keys = turned(keys, layer.rotary.frequencies, -at)[:, : count * BLOCK]  # noqa: B023
            means = keys.reshape(len(keys), -1, BLOCK, keys.shape[-1]).mean(2)
            middle = rows.mean(1, keepdims=True)
            bias = ((rows - middle) ** 2 / (rows.var(1, keepdims=True) + 1e-6)).sum((0, 2))
            chosen = {"probe": np.einsum("r,hrd->hd", bias / bias.sum(), rows), "mean": middle[:, 0], "last": rows[:, -1]}
            for name, one in chosen.items():
                scores = np.einsum("kgd,kbd->b", one.reshape(len(keys), -1, one.shape[-1]), means)
                found[name].append(fact // BLOCK in np.argsort(-scores)[:2])  # noqa: B023

        calibration.run(lab.llm.runner, [ids], len(ids), add)
        for name, hits in found.items():
            ways[name].append(float(np.mean(hits)))
    rates = ", ".join(f"{name} {np.mean(hits):.2f}" for name, hits in ways.items())
    return Found(np.subtract(ways["probe"], ways["mean"]), [f"hit rates: {rates}; two of some {count} blocks by chance {2 / count:.2f}"])


# ---- A2ATS


def books(lab: Lab, aware: bool = True) -> Codebooks:
    """Codebooks of text that no sample holds; not aware: for queries of all directions."""
    ids = lab.llm.tokenizer.encode(sources([])["standard library"][0], special=False)[:4096]
    honest = a2ats.codebook
    with patch.object(a2ats, "codebook", lambda moment, keys: honest(moment if aware else np.eye(len(moment)), keys)):
        return A2ATS(distance=DISTANCE).calibrate(lab.llm.runner, [ids], 8)


def distance(lab: Lab) -> Found:
    path = books(lab).save(lab.folder / "books.safetensors")
    task = lab.tasks(LENGTH, 6)["standard library"]
    change = {tokens: lab.nats(task, read=f"a2ats:tokens={tokens},distance={DISTANCE},profile={path}") for tokens in (4096, LENGTH // 4)}
    return Found(change[4096], [f"with a quarter of the tokens behind the first 64 read: {change[LENGTH // 4].mean():+.3f}"])


def recall(lab: Lab) -> Found:
    """Of the 32 best far tokens of the last 64 rows, by the product with the key, those among the 32 best by codes."""
    made = {"aware": books(lab), "plain": books(lab, aware=False)}
    texts = [lab.llm.tokenizer.encode(text, special=False) for text in sources([])["standard library"][1:]]
    found: dict[str, list[float]] = {name: [] for name in made}
    for ids in pieces(texts, LENGTH, lab.count(6)):
        hits: dict[str, list[float]] = {name: [] for name in made}

        def add(index: int, layer: Any, q: Any, k: Any, v: Any) -> None:
            at = np.arange(LENGTH)
            rows, keys = (widened(array(x)).astype(np.float64).swapaxes(0, 1) for x in (q, k))
            rows = turned(rows, layer.rotary.frequencies, DISTANCE - at)[:, -64:]
            keys = turned(keys, layer.rotary.frequencies, -at)[:, : LENGTH - 128]
            for head, own in enumerate(keys):
                queries = rows.reshape(len(keys), -1, *rows.shape[1:])[head].reshape(-1, rows.shape[-1])
                best = np.argsort(-(queries @ own.T), -1, kind="stable")[:, :32]
                for name, book in made.items():
                    a, vectors = book.factors[index, head].astype(np.float64), book.vectors[index, head].astype(np.float64)
                    codes = a2ats.nearest(own @ a @ (vectors @ a).T, vectors @ a)
                    near = np.argsort(-(queries @ vectors.T)[:, codes], -1, kind="stable")[:, :32]
                    hits[name].append(float(np.mean((best[:, :, None] == near[:, None]).any(-1))))  # noqa: B023

        calibration.run(lab.llm.runner, [ids], LENGTH, add)
        for name, shares in hits.items():
            found[name].append(float(np.mean(shares)))
    rates = ", ".join(f"{name} {np.mean(shares):.3f}" for name, shares in found.items())
    return Found(np.subtract(found["aware"], found["plain"]), [f"recall: {rates}; by chance {32 / (LENGTH - 128):.3f}"])


CLAIMS = (
    Claim("infllm-needle", ("read=infllm",), "Blocks find what first and newest tokens alone (StreamingLLM) miss, at equal budget",
          SMALL, f"{NATS}, blocks minus StreamingLLM", against(blocks(), STREAM)),
    Claim("infllm-representatives", ("read=infllm",), "The most attended keys represent a block better than the mean of all of them",
          SMALL, f"{NATS}, 4 of 32 keys minus all", against(blocks(), blocks(f"representatives={BLOCK}"))),
    Claim("infllm-beyond", ("read=infllm",), "Reads beyond the trained length without training, where true distances fail",
          f"running text of {LONG} tokens, a model of 1,024; 512 are read, 256 of them local",
          "nats a token, InfLLM minus the full cache", beyond),
    Claim("actqkv-cut", ("read=infllm",), "Layers may leave blocks out where the density of scores says so (here: 0.1 nats)",
          f"{SMALL}; cut=0.9", f"{NATS}, change by the cut", against(blocks("cut=0.9"), blocks()), border=-0.1),
    Claim("actqkv-probe", ("read=infllm",), "Unusual queries of a chunk find more than the mean of all",
          f"a fact in {2 * LENGTH} tokens; chunks of {CHUNK} that end with the question",
          "hit rate over layers, probe minus mean", probes),
    Claim("a2ats-distance", ("read=a2ats",), "One distance for all but the 64 newest tokens loses little (here: 0.1 nats)",
          f"running text of {LENGTH} tokens, scored behind 64; distance {DISTANCE}, all tokens read", "nats a token, change", distance,
          border=-0.1),
    Claim("a2ats-codes", ("read=a2ats",), "A codebook that knows the queries finds more of the best tokens than a plain one of equal size",
          f"256 codes a head from 4,096 tokens; the 32 best far tokens of the last 64 rows of {LENGTH}",
          "recall, aware minus plain", recall),
)  # fmt: skip
