"""Shared by the tests of sparse attention: rows over a constructed cache, and texts of an engine."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.kv.slots import Held
from redraft.ops.format import PAGE
from tests.contracts import plain
from tests.contracts.drafters import RandomTrees
from tests.contracts.identity import Run, drive, engine

METHODS = {
    "a2ats": "redraft.kv.sparse_attention.a2ats:A2ATS",
    "page-top-k": "redraft.kv.sparse_attention.page_top_k:PageTopK",
    "double-sparsity": "redraft.kv.sparse_attention.double_sparsity:DoubleSparsity",
    "sentencekv": "redraft.kv.sparse_attention.sentence_kv:SentenceKV",
    "infllm": "redraft.kv.sparse_attention.infllm:InfLLM",
}


class Scene(NamedTuple):
    """The arguments of `select`; keys: [K, n, D]; committed: the number of committed slots of each lane."""

    q: Tensor
    keys: Tensor
    seen: Tensor
    where: Tensor
    at: Tensor
    committed: list[int]

    def visible(self, head: int, row: int) -> list[int]:
        return torch.nonzero(self.seen[head, row]).flatten().tolist()

    def positions(self, read: Tensor, head: int, group: int, row: int) -> list[int]:
        """The positions of the slots that a row reads."""
        return self.where[head, read.expand(-1, self.q.shape[1], -1, -1)[head, group, row]].tolist()


def scene(
    seed: int, lanes: Seq[Seq[int]], stored: int, chain: int = 1, parents: Seq[int] = (), window: int | None = None, group: int = 3
) -> Scene:
    """Lanes with these positions, then a chain from position `stored` on and a tree below it. Slots that no row may read (padding, for
    which a backend leaves 0 in `where`) have keys that would win."""
    generator = torch.Generator().manual_seed(seed)
    heads, tail, size = len(lanes), chain + len(parents), 8
    slots = -(-(max(map(len, lanes)) + tail) // PAGE) * PAGE
    q = torch.randn(heads, group, tail, size, generator=generator, dtype=torch.float64)
    keys = torch.full((heads, slots, size), 1e6, dtype=torch.float64)
    seen, where = torch.zeros(heads, tail, slots, dtype=torch.bool), torch.zeros(heads, slots, dtype=torch.long)
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    at = [stored + r for r in range(chain)] + [stored + chain - 1 + depth for depth in depths]
    for head, lane in enumerate(lanes):
        n = len(lane)
        keys[head, : n + tail] = torch.randn(n + tail, size, generator=generator, dtype=torch.float64)
        where[head, : n + tail] = torch.tensor([*lane, *at])
        for row in range(tail):
            path = list(range(min(row + 1, chain)))
            node = row - chain
            while node >= 0:
                path.append(chain + node)
                node = parents[node]
            seen[head, row, [*range(n), *(n + slot for slot in path)]] = True
    if window is not None:
        seen &= torch.tensor(at)[:, None] - where[:, None] < window
    return Scene(q, keys, seen, where, torch.tensor(at), [len(lane) for lane in lanes])


TREE = [-1, 0, 0, -1, 3, 1, 5]
LONG = list(range(300))
SPARSE = [[*range(40), *range(70, 270)], [*range(1, 270, 3)]]  # what an eviction left, another number in each head
SCENES = {
    "decode": scene(0, [LONG, LONG], 300),
    "tree": scene(2, [LONG, LONG], 300, chain=2, parents=TREE),
    "evicted": scene(3, SPARSE, 270, chain=3, parents=TREE),
    "window": scene(4, [LONG, LONG], 300, parents=TREE, window=190),
}


def held_by(at: Scene, calls: list[tuple[int, int, int]] | None = None) -> Held:
    """What a policy may read of a scene: one layer, a lane for each head. calls: gets what was read."""

    def read(head: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        if calls is not None:
            calls.append((head, first, end))
        keys = at.keys[head : head + 1, : at.committed[head]].float().numpy()[:, first:end]
        return keys, keys

    return Held(lambda: [at.where[head, : at.committed[head]].numpy().astype(np.int32) for head in range(len(at.keys))], read)


def alone(from_: Scene, row: int) -> Scene:
    """The same row in a run without drafts: exactly the slots that it sees, without gaps. All lanes must be equally long."""
    slots = from_.visible(0, row)
    n = -(-len(slots) // PAGE) * PAGE
    keys = torch.full((len(from_.keys), n, from_.keys.shape[2]), -1e6, dtype=torch.float64)
    where, seen = torch.zeros(len(keys), n, dtype=torch.long), torch.zeros(len(keys), 1, n, dtype=torch.bool)
    keys[:, : len(slots)], where[:, : len(slots)], seen[:, :, : len(slots)] = from_.keys[:, slots], from_.where[:, slots], True
    return Scene(from_.q[:, :, row : row + 1], keys, seen, where, from_.at[row : row + 1], from_.committed)


def texts(read: str, *, drafts: bool = False, chunk: int = 512, many: int = 1, backend: str = "torch", pool: int = 80) -> Run:
    """The greedy texts of an engine with the tiny model for `many` prompts, the first always the same, in float64."""
    dice = Random(7)
    prompts = [[dice.randrange(plain.VOCAB) for _ in range(100 - 9 * i)] for i in range(many)]
    known = {(str(i), 0): reference(tuple(prompt), read) for i, prompt in enumerate(prompts)} if drafts else None
    drafter = RandomTrees(plain.VOCAB, seed=2, right=0.8, known=known) if drafts else "none"
    made = engine(drafter, backend=backend, max_model_len=256, chunk=chunk, pool=pool)
    params = SamplingParams(temperature=0, max_tokens=40, read=read)
    return drive(made, [Request(str(i), prompt, params) for i, prompt in enumerate(prompts)], [0] * many)


def reference(prompt: tuple[int, ...], read: str) -> list[int]:
    """The text of one prompt, alone and without drafts. A drafter that knows it is often right."""
    made = engine(max_model_len=256)
    return drive(made, [Request("0", list(prompt), SamplingParams(temperature=0, max_tokens=40, read=read))], [0]).texts["0"]


def register(monkeypatch: object) -> None:
    """Registers the methods by name, in case they are not registered."""
    for name, target in METHODS.items():
        monkeypatch.setitem(registry.METHODS["read"], name, target)  # type: ignore[attr-defined]
