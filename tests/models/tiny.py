"""Tiny random checkpoints of every family, made by transformers, which is the oracle of these tests. Llama-like ones are also written
without PyTorch, which transformers' models need: the same files, as test_tiny.py checks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import transformers
from numpy.typing import NDArray
from safetensors.numpy import save_file

from redraft.core.spec import ModelSpec
from redraft.models import loader
from redraft.ops.backend import Weights
from tests.arrays import ARRAYS

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

_SLIDING, _FULL = "sliding_attention", "full_attention"
_KINDS = {_SLIDING: {"rope_type": "default", "rope_theta": 100.0}, _FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}
_GEMMA = {"head_dim": 8, "sliding_window": 11, "pad_token_id": 0}
_FACTORS = {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2}
_OSS = {"head_dim": 8, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 9, "swiglu_limit": 0.6}
_FALCON = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
_LONG = {
    "original_max_position_embeddings": 24, "rope_parameters":
    {**_ROPE, "rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0], "partial_rotary_factor": 0.5},
}  # fmt: skip

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
    "stablelm-parallel": ("StableLm", {**_BASE, "hidden_size": 64, "use_parallel_residual": True, "qk_layernorm": True}),
    "stablelm-biases": ("StableLm", {**_BASE, "hidden_size": 48, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "phi3-longrope": ("Phi3", {**_BASE, "pad_token_id": 0, "hidden_size": 32, "partial_rotary_factor": 0.5, **_LONG}),
    "gemma2": ("Gemma2", {**_BASE, **_GEMMA, "query_pre_attn_scalar": 13, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {**_BASE, **_GEMMA, "rope_parameters": _KINDS, "layer_types": [_SLIDING, _SLIDING, _FULL]}),
    "olmo2": ("Olmo2", {**_BASE, "attention_bias": True}),
    "olmo3": ("Olmo3", {**_BASE, "sliding_window": 9, "num_hidden_layers": 4}),
    "granite": ("Granite", {**_BASE, **_FACTORS, "mlp_bias": True}),
    "granite-moe": ("GraniteMoe", {**_BASE, **_FACTORS, "num_local_experts": 5}),
    "gpt-neox": ("GPTNeoX", {**_BASE, "hidden_size": 64}),
    "gpt-neox-sequential": ("GPTNeoX", {**_BASE, "use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0}),
    "cohere": ("Cohere", {**_BASE, "attention_bias": True}),
    "cohere2": ("Cohere2", {**_BASE, "sliding_window": 9, "num_hidden_layers": 4}),
    "falcon": ("Falcon", {**_FALCON, "bias": True}),
    "falcon-groups": ("Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-norm": ("Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "falcon-sequential": ("Falcon", {**_FALCON, "multi_query": False, "parallel_attn": False}),
    "opt": ("OPT", {**_BASE, "ffn_dim": 40, "pad_token_id": 0, "word_embed_proj_dim": 24}),
    "opt-plain": ("OPT", {**_BASE, "ffn_dim": 40, "enable_bias": False, "word_embed_proj_dim": 24, "tie_word_embeddings": False}),
    "qwen2-moe": (
        "Qwen2Moe",
        {**_BASE, **{k: v for k, v in _EXPERTS.items() if k != "head_dim"}, "shared_expert_intermediate_size": 28, "norm_topk_prob": True},
    ),
    "gpt-oss": ("GptOss", {**_BASE, **_OSS}),
    "gpt-oss-plain": ("GptOss", {**_BASE, **_OSS, "attention_bias": False, "rope_parameters": {**_ROPE, "rope_type": "default"}}),
    "gpt2": ("GPT2", _GPT2),
    "gpt2-untied": ("GPT2", {**_GPT2, "tie_word_embeddings": False, "n_inner": 50}),
}


def config_class(name: str) -> Any:
    prefix = FAMILIES[name][0]
    return getattr(transformers, "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config")


def architecture(name: str) -> str:
    prefix = FAMILIES[name][0]
    return f"{prefix}{'LMHeadModel' if prefix == 'GPT2' else 'ForCausalLM'}"


def numbers(key: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """The weight `key`: no zero biases and norms of ones, so that a test sees if a weight is left out."""
    offset = 1.0 if len(shape) == 1 and key.endswith("weight") else 0.0
    drawn = np.random.default_rng([seed, crc32(key.encode())]).standard_normal(shape, np.float32)
    return np.float32(offset) + np.float32(0.3) * drawn


def config(name: str, **changes: Any) -> Any:
    return config_class(name)(**{**FAMILIES[name][1], **changes})


def model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A float32 model of transformers. The test is skipped where PyTorch is not installed."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")

    made = getattr(transformers, architecture(name))(config(name, **changes)).eval()
    with torch.no_grad():
        for key, value in made.named_parameters():
            value.copy_(torch.from_numpy(numbers(key, tuple(value.shape), seed)))
    return made


def save(name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """The checkpoint in float32 and one file."""
    if FAMILIES[name][0] not in LLAMA_LIKE:
        return saved(name, folder, seed, **changes)
    made = config(name, **changes)
    made.architectures, made.dtype = [architecture(name)], "float32"
    made.save_pretrained(folder)
    save_file({key: numbers(key, shape, seed) for key, shape in _shapes(made)}, folder / "model.safetensors", {"format": "pt"})
    ids = {key: getattr(made, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id") if getattr(made, key, None) is not None}
    transformers.GenerationConfig(**ids).save_pretrained(folder)
    return folder


def saved(name: str, folder: Path, seed: int = 0, shard: str = "1GB", dtype: str = "float32", **changes: Any) -> Path:
    """The checkpoint as transformers saves it. shard: size of a file at most."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    model(name, seed, **changes).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return folder


LLAMA_LIKE = "Llama", "Mistral", "Qwen2", "Qwen3"


def _shapes(made: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a Llama-like checkpoint."""
    hidden, inner = made.hidden_size, made.intermediate_size
    size = getattr(made, "head_dim", None) or hidden // made.num_attention_heads
    q, kv = made.num_attention_heads * size, made.num_key_value_heads * size
    family = made.model_type
    biased = {"q": family == "qwen2", "k": family == "qwen2", "v": family == "qwen2", "o": False}
    if getattr(made, "attention_bias", False):
        biased = dict.fromkeys(biased, True)
    yield "model.embed_tokens.weight", (made.vocab_size, hidden)
    for i in range(made.num_hidden_layers):
        for part, shape in {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}.items():
            yield f"model.layers.{i}.self_attn.{part}_proj.weight", shape
            if biased[part]:
                yield f"model.layers.{i}.self_attn.{part}_proj.bias", shape[:1]
        for part, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            yield f"model.layers.{i}.mlp.{part}_proj.weight", shape
            if getattr(made, "mlp_bias", False):
                yield f"model.layers.{i}.mlp.{part}_proj.bias", shape[:1]
        norms = ["input_layernorm", "post_attention_layernorm"]
        for norm, width in [*((norm, hidden) for norm in norms), *((f"self_attn.{x}_norm", size) for x in "qk" if family == "qwen3")]:
            yield f"model.layers.{i}.{norm}.weight", (width,)
    yield "model.norm.weight", (hidden,)
    if not made.tie_word_embeddings:
        yield "lm_head.weight", (made.vocab_size, hidden)


def load(folder: Path, dtype: str = "auto", backend: Any = ARRAYS) -> tuple[ModelSpec, Weights]:
    checkpoint = loader.inspect(folder, dtype)
    return checkpoint.spec, loader.read(checkpoint, backend)


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    """Rewrites fields of a JSON file. None removes a field."""
    path = folder / file
    raw = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))
