"""A checkpoint as one GGUF file, for the engines that read nothing else. Numbers are copied as they are, matrices in the run's dtype.

The file has no tokenizer: a benchmark speaks in token ids.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from redraft.bench.shapes import cache_folder
from redraft.errors import Unsupported
from redraft.models import loader
from redraft.models.spec import Mlp, ModelSpec

FAMILIES = ("llama", "qwen2")
_TOP = {"embed": "token_embd.weight", "head": "output.weight", "final_norm.weight": "output_norm.weight"}
_PARTS = {
    "attn_norm": ("attn_norm",), "qkv": ("attn_q", "attn_k", "attn_v"), "out": ("attn_output",),
    "mlp_norm": ("ffn_norm",), "up": ("ffn_gate", "ffn_up"), "down": ("ffn_down",),
}  # fmt: skip


def converted(folder: Path, dtype: str) -> Path:
    """The file, from the cache folder or written into it."""
    found = loader.inspect(folder, dtype)
    kind = str(found.dtype).removeprefix("torch.")
    if found.spec.family not in FAMILIES or kind not in ("bfloat16", "float16", "float32"):
        raise Unsupported(
            f"GGUF files are written for {', '.join(FAMILIES)} in bfloat16, float16 or float32, not {found.spec.family} in {kind}"
        )
    files = sorted((str(file), file.stat().st_mtime_ns) for file in {entry.file for entry in found.entries.values()})
    name = hashlib.sha256(repr((folder.resolve(), files)).encode()).hexdigest()[:10]
    made = cache_folder() / "gguf" / f"{folder.resolve().name}-{kind}-{name}.gguf"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(f".{os.getpid()}.part")
        try:
            _write(part, found)
            part.rename(made)
        finally:
            part.unlink(missing_ok=True)
    return made


def _write(path: Path, found: loader.Checkpoint) -> None:
    gguf: Any = importlib.import_module("gguf")  # an optional package
    kinds = gguf.GGMLQuantizationType
    matrix = {torch.bfloat16: kinds.BF16, torch.float16: kinds.F16, torch.float32: kinds.F32}[found.dtype]
    writer: Any = gguf.GGUFWriter(path, found.spec.family)
    _header(writer, found.spec, loader.read_config(found.path))
    for write in (False, True):  # what there is, then the numbers one by one
        for name, tensor in _tensors(found):
            data = (tensor.to(found.dtype) if tensor.ndim > 1 else tensor.float()).contiguous().view(torch.uint8).numpy()
            if write:
                writer.write_tensor_data(data)
            else:
                writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, matrix if tensor.ndim > 1 else kinds.F32)
        if not write:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
    writer.close()


def _header(writer: Any, spec: ModelSpec, config: Any) -> None:
    layer = spec.layers[0]
    assert isinstance(layer.mlp, Mlp)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(len(spec.layers))
    writer.add_feed_forward_length(layer.mlp.hidden)
    writer.add_head_count(layer.heads)
    writer.add_head_count_kv(layer.kv_heads)
    writer.add_key_length(layer.head_dim)
    writer.add_value_length(layer.head_dim)
    writer.add_layer_norm_rms_eps(layer.norm.eps)
    writer.add_rope_dimension_count(layer.head_dim)
    writer.add_rope_freq_base(_theta(config))
    writer.add_vocab_size(spec.vocab)
    writer.add_tokenizer_model("none")


def _theta(config: Any) -> float:
    rope = getattr(config, "rope_parameters", None) or {}
    theta: Any = rope.get("rope_theta") or getattr(config, "rope_theta", 10000.0)
    return float(theta)


def _tensors(found: loader.Checkpoint) -> Iterator[tuple[str, Tensor]]:
    spec, layer = found.spec, found.spec.layers[0]
    assert layer.rotary is not None
    plain = _theta(loader.read_config(found.path)) ** (-torch.arange(0, layer.head_dim, 2, dtype=torch.float64) / layer.head_dim)
    factors = plain / torch.tensor(layer.rotary.frequencies, dtype=torch.float64)
    if not torch.allclose(factors, torch.ones_like(factors)):
        yield "rope_freqs.weight", factors.float()
    files: dict[Path, Any] = {file: safe_open(file, framework="pt") for file in {entry.file for entry in found.entries.values()}}
    for name, source in found.sources.items():
        _, at, part, kind = name.split(".") if name not in _TOP else ("", "", "", "")
        names = [f"blk.{at}.{one}.{kind}" for one in _PARTS[part]] if part else [_TOP[name]]
        for target, stored in zip(names, source.names, strict=True):
            tensor: Tensor = files[found.entries[stored].file].get_tensor(stored)
            heads = {"attn_q": layer.heads, "attn_k": layer.kv_heads}.get(target.split(".")[-2], 0)
            if heads and spec.family == "llama":  # llama.cpp turns neighbours, checkpoints hold the halves of a head one after another
                tensor = tensor.unflatten(0, (heads, 2, layer.head_dim // 2)).transpose(1, 2).flatten(0, 2)
            yield target, tensor
