"""Tiny random checkpoints of every family, made and saved by transformers, which is the oracle of these tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from redraft.core.spec import ModelSpec
from redraft.models import loader
from redraft.ops.backend import Weights

transformers.utils.logging.disable_progress_bar()  # saving would show a progress bar in output that tests compare

V, CONTEXT = 61, 96
_BASE = {
    "vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ROPE = {"rope_theta": 10_000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
_GPT2 = {"vocab_size": V, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT, "bos_token_id": 1, "eos_token_id": 2}

_EXPERTS = {"head_dim": 12, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}

# name -> (class prefix in transformers, fields of the config)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {**_BASE}),
    "llama3": ("Llama", {**_BASE, "rope_parameters": {**LLAMA3, "rope_theta": 500_000.0}}),
    "llama-linear": ("Llama", {**_BASE, "rope_parameters": {**_ROPE, "rope_type": "linear", "factor": 3.0}}),
    "llama-yarn": ("Llama", {**_BASE, "rope_parameters": {**_ROPE, **_YARN}}),
    "llama-biases": ("Llama", {**_BASE, "attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "smollm": ("Llama", {**_BASE, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**_BASE, "sliding_window": 11}),
    "mistral-full": ("Mistral", {**_BASE, "sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2", {**_BASE}),
    "qwen2-window": ("Qwen2", {**_BASE, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {**_BASE, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3", {**_BASE, "head_dim": 12, "attention_bias": True}),
    "mixtral": ("Mixtral", {**_BASE, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3Moe", {**_BASE, **_EXPERTS}),
    "qwen3-moe-mixed": ("Qwen3Moe", {**_BASE, **_EXPERTS, "norm_topk_prob": True, "decoder_sparse_step": 2, "attention_bias": True}),
    "smollm3": ("SmolLM3", {**_BASE, "pad_token_id": 0, "no_rope_layer_interval": 2}),
    "smollm3-window": (
        "SmolLM3",
        {**_BASE, "pad_token_id": 0, "no_rope_layers": [1, 0, 0], "use_sliding_window": True, "sliding_window": 9},
    ),
    "starcoder2": ("Starcoder2", {**_BASE, "sliding_window": 11}),
    "starcoder2-plain": ("Starcoder2", {**_BASE, "use_bias": False, "tie_word_embeddings": False}),
    "phi3": ("Phi3", {**_BASE, "pad_token_id": 0}),
    "phi3-window": ("Phi3", {**_BASE, "pad_token_id": 0, "sliding_window": 11, "num_key_value_heads": 4}),
    "phi3-partial": ("Phi3", {**_BASE, "pad_token_id": 0, "hidden_size": 32, "partial_rotary_factor": 0.5}),
    "stablelm": ("StableLm", {**_BASE, "hidden_size": 64}),
    "stablelm-biases": ("StableLm", {**_BASE, "hidden_size": 48, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2", _GPT2),
    "gpt2-untied": ("GPT2", {**_GPT2, "tie_word_embeddings": False, "n_inner": 50}),
}


def model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A float32 model without zero biases and norms of ones, so that a test sees if a weight is left out."""
    prefix, fields = FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**{**fields, **changes})
    made = getattr(transformers, f"{prefix}{'LMHeadModel' if prefix == 'GPT2' else 'ForCausalLM'}")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in made.named_parameters():
            offset = 1.0 if value.ndim == 1 and key.endswith("weight") else 0.0
            value.copy_(offset + 0.3 * torch.randn(value.shape, generator=generator))
    return made


def save(name: str, folder: Path, seed: int = 0, shard: str = "1GB", dtype: torch.dtype | None = None, **changes: Any) -> Path:
    made = model(name, seed, **changes)
    (made.to(dtype) if dtype else made).save_pretrained(folder, max_shard_size=shard)
    return folder


def load(folder: Path, dtype: str = "auto") -> tuple[ModelSpec, Weights]:
    checkpoint = loader.inspect(folder, dtype)
    return checkpoint.spec, loader.read(checkpoint)


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    """Rewrites fields of a JSON file. None removes a field."""
    path = folder / file
    raw = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))
