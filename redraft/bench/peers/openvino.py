"""OpenVINO's runtime and CPU plugin, with a model that keeps its own cache (see ir.py): called in a plain loop, which costs less than the
pipelines of OpenVINO GenAI, or by these pipelines, which can speculate. Computations and cache have the run's dtype if the processor has
it, else float32. The plugin's default for the cache is 8 bits.
"""

from __future__ import annotations

import importlib
import os
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from redraft.bench.peers.ir import KINDS, converted, write_tokenizer
from redraft.bench.peers.peer import ASSISTANT, LOOKUP, Job, ended, timed
from redraft.models import loader
from redraft.ops.arrays import name_of

FUSED = ("FullyConnected", "RMS", "RoPE", "ScaledDotProductAttention", "Concatenation")  # of the angles; one of the last stays
CAPABILITIES = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}  # KINDS in the plugin's list of what it can
SPECULATION = {LOOKUP: {"num_assistant_tokens": 5, "max_ngram_size": 3}, ASSISTANT: {"num_assistant_tokens": 5}}  # as in GenAI's samples


class OpenVino:
    does = ("decode", "prefill", "steps")

    def __init__(self, job: Job) -> None:
        self.job = job
        ov = self.ov = importlib.import_module("openvino")
        folder = Path(loader.resolve(job.folder))
        dtype = loader.inspect(folder, job.dtype).dtype
        file = converted(folder, job.dtype)
        asks = properties(job, dtype)
        model = ov.Core().compile_model(file, "CPU", asks)
        self.request: Any = model.create_infer_request()
        kinds = Counter(node.get_rt_info()["layerType"].astype(str) for node in model.get_runtime_model().get_ops())
        self.facts: dict[str, Any] = {
            "version": ov.__version__,
            "dtype": str(dtype).removeprefix("torch."),
            "file": str(file),
            **{name.lower(): str(model.get_property(name)) for name in asks},
            "fused": {name: kinds[name] for name in FUSED},
        }

    def decode(self) -> dict[str, Any]:
        self.request.reset_state()
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
        tokens = self.job.prompt(self.job.context + max(self.job.rows))
        held = self._cache(tokens[: self.job.context - 1])
        found = {}
        for n in self.job.rows:
            self._step(held, tokens, n)  # the first call of each shape compiles kernels: warm-up
            found[n] = timed(lambda n=n: self._step(held, tokens, n), self.job.repeats)  # type: ignore[misc]
        return {"seconds": found}

    def _prefill(self) -> float:
        self.request.reset_state()
        prompt = self.job.prompt(self.job.prefill)
        begun = time.perf_counter()
        self._run(prompt, 0, 1)
        return time.perf_counter() - begun

    def _cache(self, tokens: list[int]) -> dict[str, Any]:
        """A copy of the cache after these tokens, by the names of its parts."""
        self.request.reset_state()
        if not tokens:
            return {}
        self._run(tokens, 0, 1)
        return {state.name: self.ov.Tensor(np.array(state.state.data)) for state in self.request.query_state()}

    def _step(self, held: dict[str, Any], tokens: list[int], rows: int) -> float:
        """Sets the cache, because it cannot be shortened. A set cache has no spare room, so the context's last token runs untimed first."""
        context = self.job.context
        self.request.reset_state()
        for state in self.request.query_state() if held else ():
            state.state = held[state.name]
        self._run(tokens[context - 1 : context], context - 1, 1)
        begun = time.perf_counter()
        self._run(tokens[context:][:rows], context, rows)
        return time.perf_counter() - begun

    def _run(self, tokens: list[int], first: int, wanted: int) -> list[int]:
        """One forward pass. The likeliest next token of each of the last `wanted` rows."""
        given = {
            "input_ids": np.array([tokens]),
            "position_ids": np.arange(first, first + len(tokens))[None],
            "beam_idx": np.zeros(1, np.int32),
            "wanted": np.array([wanted]),
        }
        found: list[int] = self.request.infer(given)["best"].tolist()
        return found


class OpenVinoGenAi:
    """One `LLMPipeline` for each mode, made when it is first used."""

    does = ("generate",)

    def __init__(self, job: Job) -> None:
        self.job = job
        self.ov, self.genai = importlib.import_module("openvino"), importlib.import_module("openvino_genai")
        self.dtype = loader.inspect(Path(loader.resolve(job.folder)), job.dtype).dtype
        self.pipelines: dict[str, Any] = {}
        self.facts: dict[str, Any] = {
            "version": self.genai.__version__.partition("-")[0],
            **{k.lower(): str(v) for k, v in properties(job, self.dtype).items()},
        }

    def generate(self, mode: str, prompt: list[int], tokens: int) -> dict[str, Any]:
        pipeline = self.pipelines.get(mode) or self.pipelines.setdefault(mode, self._load(mode))
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.do_sample = tokens, False
        config.stop_token_ids, config.ignore_eos = set(self.job.stop), not self.job.stop
        for name, value in SPECULATION.get(mode, {}).items():
            setattr(config, name, value)
        begun = time.perf_counter()
        out = pipeline.generate(self.ov.Tensor(np.array([prompt])), config)
        took = time.perf_counter() - begun
        return {"seconds": took, "tokens": ended(out.tokens[0], self.job.stop, tokens)}

    def _load(self, mode: str) -> Any:
        asks, more = properties(self.job, self.dtype), {}
        if mode == LOOKUP:
            more = {"prompt_lookup": True}
        if mode == ASSISTANT:
            more = {"draft_model": self.genai.draft_model(self._folder(self.job.options["assistant"], mode), "CPU", **asks)}
        return self.genai.LLMPipeline(self._folder(self.job.folder, mode), "CPU", **asks, **more)

    def _folder(self, folder: str, mode: str) -> Path:
        made = converted(Path(folder), self.job.dtype, genai=True).parent
        if mode == ASSISTANT:
            write_tokenizer(made, Path(folder))
        return made


def properties(job: Job, dtype: np.dtype[Any]) -> dict[str, Any]:
    """Of the CPU plugin. A type that the processor does not have is several times slower than float32, or refused."""
    able = importlib.import_module("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    # the plugin chooses by the processor and oneDNN by this setting, so BF16 may be refused
    bound = "BF16" not in os.environ.get("ONEDNN_MAX_CPU_ISA", "BF16")
    name = name_of(dtype)
    computed = KINDS[name] if CAPABILITIES[name] in able and not bound else "f32"
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": job.threads,
        "ENABLE_HYPER_THREADING": True,  # else it counts all cores, not those that this process may use
        "INFERENCE_PRECISION_HINT": computed,
        "KV_CACHE_PRECISION": computed,
    }
