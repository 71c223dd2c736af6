"""OpenVINO's runtime and CPU plugin on a model that keeps its cache itself (see ir.py), called in a plain loop, which is less work than
OpenVINO GenAI's pipelines. Its cache holds the run's dtype; the plugin's own choice would be 8 bits."""

from __future__ import annotations

import importlib
import os
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from redraft.bench.peers.ir import KINDS, converted
from redraft.bench.peers.peer import Asked, timed
from redraft.models import loader

FUSED = ("FullyConnected", "RMS", "RoPE", "ScaledDotProductAttention", "Concatenation")  # one of the last is left: of the angles


class OpenVino:
    does = ("decode", "prefill", "steps")

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        ov = self.ov = importlib.import_module("openvino")
        folder = Path(loader.resolve(asked.folder))
        dtype = loader.inspect(folder, asked.dtype).dtype
        file = converted(folder, asked.dtype)
        bound = "BF16" not in os.environ.get("ONEDNN_MAX_CPU_ISA", "BF16")  # the plugin asks the processor, and oneDNN then refuses
        asks = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": asked.threads,
            "ENABLE_HYPER_THREADING": True,  # or it counts cores and not what this process may use
            "INFERENCE_PRECISION_HINT": "f32" if bound else KINDS[dtype],
            "KV_CACHE_PRECISION": KINDS[dtype],
        }
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
        prompt = self.asked.prompt(self.asked.context)
        token = self._run(prompt, 0, 1)[0]
        tokens, stamps = [token], [time.perf_counter()]
        for i in range(self.asked.tokens):
            token = self._run([token], len(prompt) + i, 1)[0]
            stamps.append(time.perf_counter())
            tokens.append(token)
        return {"seconds": [z - a for a, z in pairwise(stamps)], "tokens": tokens}

    def prefill(self) -> dict[str, Any]:
        return {"seconds": timed(self._prefill, self.asked.repeats)}

    def steps(self) -> dict[str, Any]:
        tokens = self.asked.prompt(self.asked.context + max(self.asked.rows))
        held = self._cache(tokens[: self.asked.context - 1])
        found = {}
        for n in self.asked.rows:
            self._step(held, tokens, n)  # the first call of each shape compiles its kernels: nobody's time
            found[n] = timed(lambda n=n: self._step(held, tokens, n), self.asked.repeats)  # type: ignore[misc]
        return {"seconds": found}

    def _prefill(self) -> float:
        self.request.reset_state()
        prompt = self.asked.prompt(self.asked.prefill)
        begun = time.perf_counter()
        self._run(prompt, 0, 1)
        return time.perf_counter() - begun

    def _cache(self, tokens: list[int]) -> dict[str, Any]:
        """A copy of the cache that holds these tokens, by the names of its parts."""
        self.request.reset_state()
        if not tokens:
            return {}
        self._run(tokens, 0, 1)
        return {state.name: self.ov.Tensor(np.array(state.state.data)) for state in self.request.query_state()}

    def _step(self, held: dict[str, Any], tokens: list[int], rows: int) -> float:
        """The cache can be set and not shortened; there is no room behind what is set, so the context's last token, untimed, makes it."""
        context = self.asked.context
        self.request.reset_state()
        for state in self.request.query_state() if held else ():
            state.state = held[state.name]
        self._run(tokens[context - 1 : context], context - 1, 1)
        begun = time.perf_counter()
        self._run(tokens[context:][:rows], context, rows)
        return time.perf_counter() - begun

    def _run(self, tokens: list[int], first: int, wanted: int) -> list[int]:
        """One forward; the likeliest token behind each of the last `wanted` rows."""
        given = {
            "ids": np.array([tokens]),
            "positions": np.arange(first, first + len(tokens)),
            "beam_idx": np.zeros(1, np.int32),
            "wanted": np.array([wanted]),
        }
        found: list[int] = self.request.infer(given)["best"].tolist()
        return found
