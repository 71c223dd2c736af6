"""Embeddings whose text can see its own end: between layers, a placeholder in front of the text gets the state of the last token.

Yuchen Fu, Zifeng Cheng, Zhiwei Jiang, Zhonghui Wang, Yafeng Yin, Zhengliang Li, Qing Gu: Token Prepending: A Training-Free Approach for
Eliciting Better Sentence Embeddings from LLMs, 2024, arXiv 2412.11556.

1. Write the text into a template that ends with an opened quotation, with a placeholder token in front of it.
2. Before each of the layers start to exit - 1, the placeholder's state is replaced by that of the last row.
3. The vector is the state of the last row at `out`, in the counting of transformers' hidden_states: 0 is the embedding, -1 the state
   after the last layer and the final norm. Layers above do not run.

Differs: one template at a time; the placeholder's own embedding is that of token 0 instead of a random one. A text runs in one pass,
outside of the scheduler, and the prefix cache holds nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from redraft.config import SamplingParams
from redraft.core.batch import Batch
from redraft.core.layers import Layers
from redraft.core.plan import Work
from redraft.core.sequence import UNLIMITED, Pooling, Request, Sequence, Wants
from redraft.core.taps import Taps
from redraft.core.tree import EMPTY, F64
from redraft.errors import InvalidInput, OutOfMemory, PromptTooLong
from redraft.models.adapter import Adapter
from redraft.models.runner import Runner
from redraft.models.tokenizer import Tokenizer
from redraft.ops.arrays import Tensor, array, replaced
from redraft.options import Options, number

PLACE, TEXT = "<PST>", "TEXT"  # of the placeholder and of the text, in a template
PLACEHOLDER = 0  # a token
ROWS = 512  # of texts that run together
FIRST = -(1 << 40)  # number of the first sequence; nobody else counts from there


@dataclass(frozen=True)
class Prepend(Options):
    """start, exit: the layers between which the placeholder follows the last row, equal: never; out: see 3."""

    start: int = number(1, ge=0)
    exit: int = number(7, ge=0)
    out: int = -2
    template: str = f'This sentence : {PLACE} "{TEXT}" means in one word:"'

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exit < self.start:
            raise InvalidInput(f"prepend: exit = {self.exit}: must be start = {self.start} or more")
        if self.template.count(PLACE) != 1 or self.template.count(TEXT) != 1 or self.template.index(TEXT) < self.template.index(PLACE):
            raise InvalidInput(f"prepend: template = {self.template!r}: {PLACE} and after it {TEXT} are needed, each once")

    def layers(self, count: int) -> int:
        """How many of `count` layers run."""
        ran = self.out if self.out > 0 else count + 1 + self.out
        if not 1 <= ran <= count:
            raise InvalidInput(f"prepend: out = {self.out}: 1 to {count} or -{count} to -1 is allowed, the layers of this model")
        if self.exit > ran:
            raise InvalidInput(f"prepend: exit = {self.exit}: must be {ran} or less, because layers above do not run")
        return ran

    def tokens(self, text: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
        """The prompt for a text, and the placeholder's row."""
        before, _, after = self.template.partition(PLACE)
        first = tokenizer.encode(before.rstrip())
        return [*first, PLACEHOLDER, *tokenizer.encode(after.replace(TEXT, quoted(text)), special=False)], len(first)


def quoted(text: str) -> str:
    """As it stands in quotation marks: it ends with a mark, and with no question."""
    found = text.strip().replace('"', "'")
    found = f"{found[:-1]}." if found.endswith("?") else found
    return found if found.endswith((".", "!")) else f"{found}."


@dataclass(frozen=True)
class Following:
    """place: the row that takes the state of the last one."""

    place: int
    cuts: frozenset[int]

    def act(self, layer: int, h: Tensor, positions: NDArray[np.int32]) -> Tensor:
        return replaced(h, [self.place], h[-1:])  # 2.


def embed(
    runner: Runner, method: Prepend, prompts: Seq[tuple[list[int], int]], *, longest: int, adapter: Adapter | None = None
) -> list[F64]:
    """f64[hidden] for each prompt: its tokens, and the row of the placeholder. longest: tokens of a prompt, at most."""
    ran = method.layers(len(runner.spec.layers))
    if long := next((tokens for tokens, _ in prompts if len(tokens) > longest), None):
        raise PromptTooLong(f"prompt has {len(long)} tokens with its template: max_model_len allows {longest}")
    cuts, found = frozenset(range(method.start, method.exit)), list[F64]()
    layers = Layers.whole(range(ran)) if ran < len(runner.spec.layers) else None
    seqs = []
    for i, (tokens, place) in enumerate(prompts):
        request = Request("", tokens, SamplingParams(temperature=0), wants=Wants(pooling=Pooling.LAST), adapter=adapter)
        seq = Sequence(FIRST + i, request, 0, list(tokens), len(tokens), 0, UNLIMITED, layers=layers)
        seq.between = Following(place, cuts) if cuts else None
        seqs.append(seq)
    while len(found) < len(seqs):
        found += _run(runner, _together(runner, seqs[len(found) :]), ran)
    return found


def _together(runner: Runner, seqs: Seq[Sequence]) -> list[Sequence]:
    """The first texts that run in one pass."""
    rows, need, some, free = 0, 0, list[Sequence](), runner.memory.available()
    for seq in seqs:
        rows, need = rows + len(seq.tokens), need + runner.memory.need(seq, len(seq.tokens))
        if need > free or (some and rows > ROWS):
            break
        some.append(seq)
    if not some:
        raise OutOfMemory(f"prepend: a text needs {need} blocks of the cache, and {free} are free")
    return some


def _run(runner: Runner, seqs: list[Sequence], ran: int) -> list[F64]:
    work, trees = [Work(seq, len(seq.tokens)) for seq in seqs], [EMPTY] * len(seqs)
    for seq in seqs:
        runner.memory.open(seq)
    try:
        batch = Batch.pack(work, trees, runner.memory.reserve(work, trees))
        states = runner.forward(batch, Taps(frozenset({ran - 1}))).hidden[ran - 1]
    finally:
        for seq in seqs:
            runner.memory.discard(seq)
            runner.memory.free(seq)
    last = states[(batch.starts[1:] - 1).astype(np.int64)]
    rows = array(last).astype(np.float64) if ran < len(runner.spec.layers) else runner.normed(last)
    return list(rows)
