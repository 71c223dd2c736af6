"""Whether two texts that should be equal differ by a near-tie of the numbers or by a fault.

A text that differs from the plain loop's is fed to the plain model again, teacher-forced: its own tokens as a causal chain, without
tree and draft, with the processors, seed and positions of the request. It is a near-tie if each of its tokens is what the plain model
draws there, or within `tolerance` of it. The gap is the difference to the best token after processors and noise. For a token that a
filter dropped, it is the increase of its logit that would make it win.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import islice
from typing import Any

import ml_dtypes
import numpy as np

from redraft.config import SamplingParams
from redraft.core.batch import Batch
from redraft.core.noise import Stream, gumbel, key
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import Request, Sequence
from redraft.core.taps import Taps
from redraft.core.tree import EMPTY
from redraft.llm import LLM
from redraft.models.adapter import Adapter
from redraft.ops.arrays import array, numpy_dtype
from redraft.sample.processors.processor import F64, Row

NEAR_TIE = 1e-4  # float32: the largest difference of two logits that rounding may put in another order
# bfloat16 and float16, in spacings of numbers as large as the row's largest logit: two logits, rounded in two runs, each by up
# to half a spacing. Measured on pilot-16m, 960 tokens in bfloat16: the largest gap was an eighth of that.
SPACINGS = 2.0
CHUNK = 64


def tolerance(dtype: Any, logits: F64) -> float:
    """The largest gap to the plain model's choice that counts as a near-tie. float64: 0. dtype: of NumPy or PyTorch."""
    if numpy_dtype(dtype) == np.float64:
        return 0.0
    if numpy_dtype(dtype) == np.float32:
        return NEAR_TIE
    return SPACINGS * _spacing(dtype) * float(np.abs(logits[np.isfinite(logits)]).max())


def _spacing(dtype: Any) -> float:
    """Of the numbers from 1 on."""
    return float(ml_dtypes.finfo(numpy_dtype(dtype)).eps)  # type: ignore[no-untyped-call]


def tolerance_label(dtype: Any) -> str:
    if numpy_dtype(dtype) == np.float64:
        return "none"
    if numpy_dtype(dtype) == np.float32:
        return f"a margin under {NEAR_TIE:g}"
    return f"a margin under {100 * SPACINGS * _spacing(dtype):.1f} % of the row's largest logit"


@dataclass(frozen=True)
class Divergence:
    """The first token where a text differs from the plain loop's. `expected`, `found`: token ids, None if that text had ended.
    `margin`: the difference of the two after processors and noise, None if a filter dropped one or a text had ended. `worst`: the
    largest gap of all tokens of the text. near_tie: all gaps are within tolerance."""

    prompt: str
    turn: int
    position: int
    expected: int | None
    found: int | None
    margin: float | None
    worst: float | None
    near_tie: bool


def first_difference(plain: Seq[int], text: Seq[int]) -> int | None:
    """The first position at which two texts differ; None if they are equal."""
    for i, (a, b) in enumerate(zip(plain, text)):
        if a != b:
            return i
    return None if len(plain) == len(text) else min(len(plain), len(text))


def examine(llm: LLM, name: str, turn: int, prompt: list[int], plain: list[int], text: list[int], params: SamplingParams) -> Divergence:
    """Why `text` differs from `plain`. Both follow the tokens `prompt`. `llm` is the plain loop and must be idle."""
    at = first_difference(plain, text)
    assert at is not None
    if at >= min(len(plain), len(text)):
        expected, found = [tokens[at] if at < len(tokens) else None for tokens in (plain, text)]
        return Divergence(name, turn, at, expected, found, None, None, False)
    replay = _Replay(llm, prompt, text, params)
    worst, margin, near = 0.0, None, True
    for i, logits in enumerate(replay.rows()):
        allowed = tolerance(llm.runner.backend.dtype, logits)
        row = replay.weigh(logits, i)
        gap = replay.gap(row, logits, i, text[i], allowed)
        worst, near = max(worst, gap), near and gap <= allowed
        if i == at:
            a, b = replay.value(row, plain[i]), replay.value(row, text[i])
            margin = abs(a - b) if a is not None and b is not None else None
            near = near and replay.gap(row, logits, i, plain[i], allowed) <= allowed and allowed > 0
    return Divergence(name, turn, at, plain[at], text[at], margin, worst, near)


def rows(llm: LLM, tokens: list[int], adapter: Adapter | None = None) -> Iterator[F64]:
    """Raw logits, f64[V], after each token, from causal chunks of the plain runner with this adapter. The runner must be idle."""
    runner = llm.runner
    params = SamplingParams(prompt_logprobs=0)  # so that the logits of every chain row are computed
    seq = Sequence(-1, Request("replay", tokens, params, adapter=adapter), 0, tokens, len(tokens), 0, sync_point=len(tokens))
    runner.memory.open(seq)
    try:
        while seq.pending:
            work = [Work(seq, min(CHUNK, seq.pending))]
            pages = runner.memory.reserve(work, [EMPTY])
            out = runner.forward(Batch.pack(work, [EMPTY], pages), Taps(logits=True))
            assert out.logits is not None and len(out.logits) == work[0].rows
            runner.memory.move(runner.memory.commit(work, [Accepted()]))
            for row in out.logits:
                yield array(row).astype(np.float64)
    finally:
        runner.memory.free(seq)


@dataclass(frozen=True)
class _Replay:
    """The plain model's choice before each token of a text."""

    llm: LLM
    prompt: list[int]
    text: list[int]
    params: SamplingParams

    def rows(self) -> Iterator[F64]:
        """Raw logits, f64[V], before each token of the text, from causal chunks of the plain runner."""
        adapter = None if self.params.lora is None else self.llm.runner.adapters[self.params.lora]
        yield from islice(rows(self.llm, [*self.prompt, *self.text[:-1]], adapter), len(self.prompt) - 1, None)

    def weigh(self, logits: F64, i: int) -> Row:
        """Processed logits with the noise of the token at place i of the text."""
        sampler = self.llm.engine.sampler
        seq = Sequence(
            -1, Request("replay", self.prompt, self.params), 0, self.prompt, len(self.prompt), self.params.seed or 0, sync_point=0
        )
        row = Row(sampler.ids, logits.copy(), seq, self.text[:i])
        for processor in sampler.check(self.params):
            processor.apply(row)
        if not self.params.greedy:
            row.values += gumbel(key(seq.seed, Stream.TARGET, len(self.prompt) + i), row.ids)
        return row

    def value(self, row: Row, token: int) -> float | None:
        """The token's processed value; None if a filter dropped it."""
        place = np.flatnonzero(row.ids == token)
        return float(row.values[place[0]]) if len(place) else None

    def gap(self, row: Row, logits: F64, i: int, token: int, allowed: float) -> float:
        """How far the value of `token` is below the best at position i. For a token that a filter dropped: `allowed` if adding `allowed`
        to its logit makes it the best, else infinite."""
        own = self.value(row, token)
        if own is not None:
            return float(row.values.max()) - own
        raised = logits.copy()
        raised[token] += allowed
        row = self.weigh(raised, i)
        own = self.value(row, token)
        return allowed if own is not None and own >= row.values.max() else float("inf")
