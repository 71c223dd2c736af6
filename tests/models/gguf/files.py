"""Writes small GGUF files with the package `gguf`: folders of tests/models/tiny.py and their tokenizers, as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.numpy import load_file

ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3"}  # llama.cpp's names that are not transformers'


def write(folder: Path, out: Path, kind: Kind = Kind.F32, *, split: int = 0, drop: str = "", extra: Any = (), **metadata: Any) -> Path:
    """The folder's checkpoint as a GGUF file. kind: type of the matrices; split: most tensors of a file; drop: a tensor to leave out;
    extra: (name, numbers) of further tensors; metadata: further keys of the architecture, with __ for a dot."""
    raw = json.loads((folder / "config.json").read_text())
    family = raw["model_type"]
    writer = gguf.GGUFWriter(out, ARCHITECTURES.get(family, family), split_max_tensors=split)
    _header(writer, raw)
    for key, value in metadata.items():
        writer.kv_data[0].pop(f"{writer.arch}.{key.replace('__', '.')}", None)
        name = f"{writer.arch}.{key.replace('__', '.')}"
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](name, value)
    if (folder / "tokenizer.json").exists():
        byte_level(writer, folder)
    for name, numbers in [*_tensors(folder, raw, writer.arch), *extra]:
        stored = Kind.F32 if numbers.ndim == 1 else kind
        if name != drop:
            writer.add_tensor(name, gguf.quants.quantize(numbers, stored), raw_dtype=stored)
    close(writer)
    return out


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _header(writer: gguf.GGUFWriter, raw: dict[str, Any]) -> None:
    if raw["model_type"] == "gpt2":
        writer.add_context_length(raw["n_positions"])
        writer.add_embedding_length(raw["n_embd"])
        writer.add_block_count(raw["n_layer"])
        writer.add_feed_forward_length(raw["n_inner"] or 4 * raw["n_embd"])
        writer.add_head_count(raw["n_head"])
        writer.add_layer_norm_eps(raw["layer_norm_epsilon"])
        return
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    rope = raw["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if raw.get("head_dim"):
        writer.add_key_length(raw["head_dim"])
        writer.add_value_length(raw["head_dim"])
        writer.add_rope_dimension_count(raw["head_dim"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if raw.get("num_local_experts"):
        writer.add_expert_count(raw["num_local_experts"])
        writer.add_expert_used_count(raw["num_experts_per_tok"])


def _tensors(folder: Path, raw: dict[str, Any], architecture: str) -> list[tuple[str, NDArray[np.float32]]]:
    stored = {name: value.astype(np.float32) for name, value in load_file(folder / "model.safetensors").items()}
    layers = raw.get("num_hidden_layers") or raw["n_layer"]
    named = gguf.get_tensor_name_map(next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), layers)
    found = []
    for layer in range(layers if raw.get("num_local_experts") else 0):
        at, experts = f"model.layers.{layer}.block_sparse_moe", range(raw["num_local_experts"])
        for part in ("w1", "w2", "w3"):
            several = [stored.pop(f"{at}.experts.{e}.{part}.weight") for e in experts]
            stored[f"layers.{layer}.feed_forward.experts.{part}.weight"] = np.stack(several)
    for name, value in stored.items():
        heads = {"q_proj": raw.get("num_attention_heads"), "k_proj": raw.get("num_key_value_heads")}.get(name.split(".")[-2])
        if heads and architecture == "llama":
            value = value.reshape(heads, 2, len(value) // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if any(part in name for part in (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            value = value.T
        if "norm" in name and architecture.startswith("gemma"):  # files hold the gains, checkpoints the gains less 1
            value = value + 1
        target = named.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target, name
        found.append((target, np.ascontiguousarray(value)))
    if raw.get("rope_parameters", {}).get("rope_type") == "llama3":
        found.append(("rope_freqs.weight", _llama3(raw)))
    return found


def _llama3(raw: dict[str, Any]) -> NDArray[np.float32]:
    """As in llama.cpp's converter."""
    rope, dim = raw["rope_parameters"], raw["head_dim"]
    low, high = (rope["original_max_position_embeddings"] / rope[f"{name}_freq_factor"] for name in ("low", "high"))
    found = []
    for i in range(0, dim, 2):
        length = 2 * np.pi * rope["rope_theta"] ** (i / dim)
        if length < high:
            found.append(1.0)
        elif length > low:
            found.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(found, np.float32)


def vocabulary(out: Path, add: Callable[[gguf.GGUFWriter], None]) -> Path:
    """A file with only a tokenizer."""
    writer = gguf.GGUFWriter(out, "llama")
    add(writer)
    close(writer)
    return out


def byte_level(writer: gguf.GGUFWriter, folder: Path, pre: str = "gpt-2") -> None:
    """The byte-level tokenizer of a folder."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    special = {token["content"]: token["special"] for token in whole["added_tokens"]}
    ids = whole["model"]["vocab"] | {token["content"]: token["id"] for token in whole["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    kinds = {None: gguf.TokenType.NORMAL, True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[special.get(token)] for token in tokens])
    if merges := whole["model"]["merges"]:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(ids[config["bos_token"]])
    writer.add_eos_token_id(ids[config["eos_token"]])
    writer.add_add_bos_token("post_processor" in whole and whole["post_processor"] is not None)
    if "chat_template" in config:
        writer.add_chat_template(config["chat_template"])


def tensors(out: Path, *records: tuple[str, NDArray[Any], Kind]) -> Path:
    """A file with only these tensors."""
    writer = gguf.GGUFWriter(out, "llama")
    for name, data, kind in records:
        writer.add_tensor(name, data, raw_dtype=kind)
    close(writer)
    return out
