"""Redraft itself. decode, prefill and generate use `LLM`; a step of many rows is a forward pass that verifies a draft. A mode of
`generate` is a drafter."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from redraft import __version__
from redraft.bench.divergence import tolerance
from redraft.bench.peers.peer import PLAIN, SPENT, Job, timed
from redraft.config import EngineConfig, SamplingParams
from redraft.core.batch import Batch
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import UNLIMITED, Request, Sequence
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import EMPTY, TokenTree
from redraft.llm import LLM
from redraft.ops import pytorch
from redraft.ops.arrays import array, name_of
from redraft.ops.backend import ForwardResult


class Redraft:
    does = ("decode", "prefill", "steps", "generate")

    def __init__(self, job: Job) -> None:
        self.job = job
        own = {name: value for name, value in job.options.items() if name != "policies"}
        given = {"threads": job.threads, "dtype": job.dtype, "token_budget": max(512, job.prefill), "max_model_len": job.longest}
        fixed = {"model": job.folder, "max_seqs": 1, "prefix_sharing": False, "draft": "none"}
        self.llm = LLM(config=EngineConfig.of(**{**given, **own, **fixed}))
        self.lora = self.llm.config.model.only_adapter()
        self.modes: dict[str, tuple[LLM, Any]] = {}
        self.runner = self.llm.runner
        backend = self.runner.backend
        self.facts: dict[str, Any] = {
            "version": __version__,
            "backend": backend.name,
            "dtype": name_of(backend.dtype),
            "features": sorted(backend.features),
            "quant": self.llm.config.model.quant,
            **pytorch.facts(),
        }
        if getattr(self.runner.quant, "keeps", False):
            weights = self.runner.weights
            embedding = weights.embed.nbytes if hasattr(weights.embed, "nbytes") else 0
            self.facts["stored_bytes"] = weights.bytes - embedding

    # ---- measurements

    def decode(self) -> dict[str, Any]:
        params = SamplingParams(temperature=0, max_tokens=self.job.tokens + 1, ignore_eos=True, lora=self.lora)
        stamps, tokens = [], []
        inside: list[Any] = []
        for delta in self.llm.stream({"prompt_token_ids": self.job.prompt(self.job.context)}, params):
            if delta.token_ids:
                stamps.append(time.perf_counter())
                inside.append(getattr(self.runner.backend, "inside", None))
                tokens += delta.token_ids
        found: dict[str, Any] = {"seconds": [z - a for a, z in pairwise(stamps)], "tokens": tokens}
        if inside[-1] is not None:  # the backend counts the seconds in its kernels
            found["inside"] = [z - a for a, z in pairwise(inside)]
        return found

    def prefill(self) -> dict[str, Any]:
        return {"seconds": timed(self._prefill, self.job.repeats)}

    def steps(self) -> dict[str, Any]:
        context, max_rows = self.job.context, max(self.job.rows)
        tokens = self.job.prompt(context + max_rows)
        seq = self._open(tokens[: context + 1])
        try:
            self._read(seq, context)
            self._step(seq, tokens[context + 1 :][: max_rows - 1])  # warm-up
            found: dict[int, list[float]] = {n: [] for n in self.job.rows}
            begun = time.perf_counter()
            for _ in range(self.job.repeats):  # all numbers of rows in turns, because the machine's speed changes
                for n, times in found.items():
                    times.append(self._step(seq, tokens[context + 1 :][: n - 1]))
                if time.perf_counter() - begun > SPENT * len(found):
                    break
        finally:
            self.runner.memory.free(seq)
        return {"seconds": {n: median(times) for n, times in found.items()}}

    def generate(self, mode: str, prompt: list[int], tokens: int) -> dict[str, Any]:
        """The drafter begins with nothing learned. "note": which one it is, if `mode` does not name it."""
        if mode not in self.modes:
            llm = self.llm if mode == PLAIN else self.llm.sibling(draft=mode)
            self.modes[mode] = llm, llm.engine.drafter.snapshot()
        llm, state = self.modes[mode]
        if state is not None:
            llm.engine.drafter.restore(state)
        policies, stop = self.job.options.get("policies", {}), self.job.stop
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, stop_token_ids=stop, lora=self.lora, **policies)
        begun = time.perf_counter()
        (output,) = llm.generate({"prompt_token_ids": prompt}, params)
        took = time.perf_counter() - begun
        drafter = f"{llm.config.draft} with {llm.config.schedule.draft_rows} rows"
        return {"seconds": took, "tokens": output.outputs[0].token_ids, "note": "" if mode in (PLAIN, llm.config.draft) else drafter}

    def margin(self, prompt: list[int], expected: int, found: int) -> dict[str, Any]:
        """The difference in logits of `expected` and `found` after `prompt`, and which difference counts as a near-tie there."""
        seq = self._open(prompt)
        try:
            self._read(seq, len(prompt) - 1)
            logits = self._forward(Work(seq, 1), EMPTY, Taps(logits=True)).logits
        finally:
            self.runner.memory.free(seq)
        assert logits is not None
        row = array(logits)[0].astype(np.float64)
        return {"margin": float(row[expected] - row[found]), "near": tolerance(self.runner.backend.dtype, row)}

    # ---- one forward pass

    def _prefill(self) -> float:
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, lora=self.lora)
        begun = time.perf_counter()
        self.llm.generate({"prompt_token_ids": self.job.prompt(self.job.prefill)}, params)
        return time.perf_counter() - begun

    def _open(self, tokens: list[int]) -> Sequence:
        adapter = None if self.lora is None else self.runner.adapters[self.lora]
        request = Request("bench", tokens, SamplingParams(temperature=0), adapter=adapter)
        seq = Sequence(-1, request, 0, tokens, len(tokens), 0, sync_point=UNLIMITED)
        self.runner.memory.open(seq)
        return seq

    def _read(self, seq: Sequence, length: int) -> None:
        """Computes the first `length` tokens into the cache."""
        while seq.stored < length:
            work = Work(seq, min(512, length - seq.stored))
            self._forward(work, EMPTY)
            self.runner.memory.move(self.runner.memory.commit([work], [Accepted()]))

    def _step(self, seq: Sequence, draft: list[int]) -> float:
        """Runs the last token and a drafted chain after it, as a step does. Nothing is committed."""
        tree = TokenTree.chain(draft)
        begun = time.perf_counter()
        out = self._forward(Work(seq, 1), tree)
        took = time.perf_counter() - begun
        assert len(out.argmax) == 1 + len(draft)
        self.runner.memory.discard(seq)
        return took

    def _forward(self, work: Work, tree: TokenTree, taps: Taps = NO_TAPS) -> ForwardResult:
        pages = self.runner.memory.reserve([work], [tree])
        return self.runner.forward(Batch.pack([work], [tree], pages), taps)
