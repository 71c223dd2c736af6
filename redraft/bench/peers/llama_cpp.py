"""llama.cpp through llama-cpp-python: its plain C functions, or its class `Llama`, which can speculate. It uses the instructions that it
was compiled for."""

from __future__ import annotations

import importlib
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from redraft.bench.peers.gguf import converted
from redraft.bench.peers.peer import LOOKUP, PLAIN, Job, ended, timed
from redraft.errors import Unsupported
from redraft.models import loader

PREDICTED = 2  # tokens of one prompt lookup, llama-cpp-python's advice for a CPU; its default is 10

llama_cpp: Any = None  # an optional package, imported by the first engine


def _file(model: Path, job: Job) -> Path:
    """The model if it is a GGUF file, else one made from it."""
    return model if model.is_file() else converted(model, job.dtype)


class LlamaCpp:
    does = ("decode", "prefill", "steps")

    def __init__(self, job: Job) -> None:
        global llama_cpp
        llama_cpp = importlib.import_module("llama_cpp")
        self.job = job
        folder = loader.resolve(job.folder)
        file = _file(folder, job)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise Unsupported(f"llama.cpp cannot load {file}")
        params = llama_cpp.llama_context_default_params()
        max_rows = max(job.context, job.prefill, *job.rows)
        params.n_ctx, params.n_batch, params.n_ubatch = job.longest, max_rows, max_rows
        params.n_threads = params.n_threads_batch = job.threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise Unsupported(f"llama.cpp cannot make a context of {job.longest} tokens")
        self.memory: Any = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(max_rows, 0, 1)
        self.facts: dict[str, Any] = {
            "version": llama_cpp.__version__,
            "dtype": str(loader.inspect(folder, job.dtype).dtype).removeprefix("torch."),
            "file": str(file),
            "system": llama_cpp.llama_print_system_info().decode().strip(),
        }

    def decode(self) -> dict[str, Any]:
        llama_cpp.llama_memory_clear(self.memory, True)
        prompt = self.job.prompt(self.job.context)
        token = self._run(prompt, 0, 1)[0]
        tokens, stamps = [token], [time.perf_counter()]
        for i in range(self.job.tokens):
            token = self._run([token], len(prompt) + i, 1)[0]
            stamps.append(time.perf_counter())
            tokens.append(token)
        return {"seconds": [z - a for a, z in pairwise(stamps)], "tokens": tokens}

    def prefill(self) -> dict[str, Any]:
        return {"seconds": timed(self._prefill, self.job.repeats)}

    def steps(self) -> dict[str, Any]:
        context = self.job.context
        tokens = self.job.prompt(context + max(self.job.rows))
        llama_cpp.llama_memory_clear(self.memory, True)
        self._run(tokens[:context], 0, 1)
        self._step(tokens[context:])  # warm-up
        found = {n: timed(lambda n=n: self._step(tokens[context:][:n]), self.job.repeats) for n in self.job.rows}  # type: ignore[misc]
        return {"seconds": found}

    def _prefill(self) -> float:
        llama_cpp.llama_memory_clear(self.memory, True)
        prompt = self.job.prompt(self.job.prefill)
        begun = time.perf_counter()
        self._run(prompt, 0, 1)
        return time.perf_counter() - begun

    def _step(self, tokens: list[int]) -> float:
        begun = time.perf_counter()
        self._run(tokens, self.job.context, len(tokens))
        took = time.perf_counter() - begun
        if not llama_cpp.llama_memory_seq_rm(self.memory, 0, self.job.context, -1):
            raise Unsupported("llama.cpp cannot drop the last tokens of this model's cache")
        return took

    def _run(self, tokens: list[int], first: int, wanted: int) -> list[int]:
        """One forward pass. The likeliest next token of each of the last `wanted` rows."""
        batch, count = self.batch, len(tokens)
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, first + i, 1, 0
            batch.logits[i] = i >= count - wanted
        if code := llama_cpp.llama_decode(self.context, batch):
            raise Unsupported(f"llama_decode of {count} rows returned {code}")
        rows = (llama_cpp.llama_get_logits_ith(self.context, i) for i in range(count - wanted, count))
        return [int(np.ctypeslib.as_array(row, (self.job.vocab,)).argmax()) for row in rows]


class LlamaCppPython:
    """The class `Llama` for each mode: with a draft model it computes the logits of all rows, without one of the last row only."""

    does = ("generate",)

    def __init__(self, job: Job) -> None:
        package = importlib.import_module("llama_cpp")
        speculative = importlib.import_module("llama_cpp.llama_speculative")
        self.job = job
        folder = loader.resolve(job.folder)
        file = job.options.get("gguf") or _file(folder, job)
        common = {"model_path": str(file), "n_ctx": job.longest, "n_threads": job.threads, "n_threads_batch": job.threads, "verbose": False}
        lookup = speculative.LlamaPromptLookupDecoding(num_pred_tokens=PREDICTED)
        # without logits_all its array of scores has room for one batch, and a longer prompt raises ValueError (0.3.36)
        drafted = package.Llama(**common, draft_model=lookup, logits_all=True)
        self.modes: dict[str, Any] = {PLAIN: package.Llama(**common), LOOKUP: drafted}
        self.facts: dict[str, Any] = {"version": package.__version__, "file": str(file)}

    def generate(self, mode: str, prompt: list[int], tokens: int) -> dict[str, Any]:
        llama = self.modes[mode]
        llama.reset()  # else it would keep what the last prompt has in common with this one
        begun = time.perf_counter()
        found = ended(llama.generate(prompt, temp=0.0, repeat_penalty=1.0), self.job.stop, tokens)
        return {"seconds": time.perf_counter() - begun, "tokens": found}
