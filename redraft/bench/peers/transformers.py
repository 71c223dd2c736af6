"""Hugging Face transformers. The model is called in a plain loop, which costs less than `generate`."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from redraft.bench.peers.peer import ASSISTANT, LOOKUP, PLAIN, Job, ended, timed
from redraft.errors import Unsupported
from redraft.models import loader
from redraft.ops.torch_arrays import dtype_of

PREDICTED = 10  # tokens of one prompt lookup, the value of transformers' documentation; it has no default


class Transformers:
    does = ("decode", "prefill", "steps", "generate")

    def __init__(self, job: Job) -> None:
        self.job = job
        torch.set_num_threads(job.threads)
        transformers.utils.logging.set_verbosity_error()
        dtype = dtype_of(loader.inspect(loader.resolve(job.folder), job.dtype).dtype)
        self.model = self._load(job.folder, dtype)
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=list(job.stop) or None, pad_token_id=0)
        self.modes: dict[str, dict[str, Any]] = {PLAIN: {}, LOOKUP: {"prompt_lookup_num_tokens": PREDICTED}}
        if assistant := job.options.get("assistant"):
            self.modes[ASSISTANT] = {"assistant_model": self._load(assistant, dtype)}
        self.facts: dict[str, Any] = {
            "version": transformers.__version__,
            "dtype": str(dtype).removeprefix("torch."),
            "attention": "sdpa",
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
        }

    @torch.inference_mode()
    def decode(self) -> dict[str, Any]:
        cache = transformers.DynamicCache()
        token = self._likeliest(self.job.prompt(self.job.context), cache)
        tokens, stamps = [token], [time.perf_counter()]
        for _ in range(self.job.tokens):
            token = self._likeliest([token], cache)
            stamps.append(time.perf_counter())
            tokens.append(token)
        return {"seconds": [z - a for a, z in pairwise(stamps)], "tokens": tokens}

    def prefill(self) -> dict[str, Any]:
        return {"seconds": timed(self._prefill, self.job.repeats)}

    @torch.inference_mode()
    def steps(self) -> dict[str, Any]:
        context = self.job.context
        tokens = self.job.prompt(context + max(self.job.rows))
        cache = transformers.DynamicCache()
        self._likeliest(tokens[:context], cache)
        self._step(tokens[context:], cache)  # warm-up
        found = {n: timed(lambda n=n: self._step(tokens[context:][:n], cache), self.job.repeats) for n in self.job.rows}  # type: ignore[misc]
        return {"seconds": found}

    @torch.inference_mode()
    def generate(self, mode: str, prompt: list[int], tokens: int) -> dict[str, Any]:
        begun = time.perf_counter()
        ids = torch.tensor([prompt])
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **self.modes[mode])
        took = time.perf_counter() - begun
        return {"seconds": took, "tokens": ended(out[0, len(prompt) :].tolist(), self.job.stop, tokens)}

    def _load(self, folder: str, dtype: torch.dtype) -> Any:
        if Path(folder).is_file():
            raise Unsupported(f"{folder}: a GGUF file; transformers is measured with folders only")
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        ).eval()

    @torch.inference_mode()
    def _prefill(self) -> float:
        prompt = self.job.prompt(self.job.prefill)
        begun = time.perf_counter()
        self._likeliest(prompt, transformers.DynamicCache())
        return time.perf_counter() - begun

    def _step(self, tokens: list[int], cache: Any) -> float:
        begun = time.perf_counter()
        best = self._logits(tokens, cache, len(tokens)).argmax(-1).tolist()
        took = time.perf_counter() - begun
        assert len(best) == len(tokens)
        cache.crop(-len(tokens))
        return took

    def _likeliest(self, tokens: list[int], cache: Any) -> int:
        """The next token. The head runs on the last row only."""
        return int(self._logits(tokens, cache, 1)[0].argmax())

    def _logits(self, tokens: list[int], cache: Any, rows: int) -> Tensor:
        out = self.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=rows)
        logits: Tensor = out.logits[0]
        return logits
