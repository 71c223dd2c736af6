"""A checkpoint as one GGUF file, for engines that read only GGUF. Numbers are copied unchanged, matrices in the run's dtype.

A benchmark that uses token ids needs no tokenizer in the file. A server needs one.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redraft.bench.shapes import cache_folder
from redraft.core.spec import Mlp, ModelSpec
from redraft.errors import Unsupported
from redraft.models import loader
from redraft.models.gguf import vocabulary
from redraft.models.gguf.names import PARTS, TOP
from redraft.models.tokenizer import Tokenizer
from redraft.ops.arrays import Numbers, name_of

FAMILIES = ("llama", "qwen2")
_CUTS = {"": "gpt-2", **{vocabulary.CUTS[name][0]: name for name in ("llama-bpe", "qwen2")}}  # "": the expression of ByteLevel


def converted(folder: Path, dtype: str, *, tokenizer: bool = False) -> Path:
    """The file, from the cache folder or written into it. tokenizer: include the checkpoint's, which must be byte-level BPE."""
    found = loader.inspect(folder, dtype)
    kind = str(found.dtype)
    if found.spec.family not in FAMILIES or kind not in ("bfloat16", "float16", "float32"):
        raise Unsupported(
            f"GGUF files are written for {', '.join(FAMILIES)} in bfloat16, float16 or float32, not {found.spec.family} in {kind}"
        )
    words = read_vocabulary(folder) if tokenizer else None
    files = sorted((str(file), file.stat().st_mtime_ns) for file in found.tensors.files)
    name = hashlib.sha256(repr((folder.resolve(), files)).encode()).hexdigest()[:10]
    made = cache_folder() / "gguf" / f"{folder.resolve().name}-{kind}{'-text' * tokenizer}-{name}.gguf"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(f".{os.getpid()}.part")
        try:
            _write(part, found, words)
            part.rename(made)
        finally:
            part.unlink(missing_ok=True)
    return made


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE tokenizer. cut: llama.cpp's name for the cutting into words; special: ids of tokens without text; added: ids of
    texts that are always one token; begins: whether every text begins with `bos`."""

    tokens: dict[int, str]
    merges: list[str]
    special: frozenset[int]
    added: frozenset[int]
    cut: str
    begins: bool
    bos: int | None
    eos: int | None


def read_vocabulary(folder: Path) -> Vocabulary:
    """Unsupported names what llama.cpp would do differently."""
    tokenizer = Tokenizer(folder)
    try:
        whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except OSError:
        raise Unsupported(f"{folder}: GGUF files need a tokenizer.json, and there is none") from None
    model, bos = whole["model"], tokenizer.vocabulary.id("bos_token")
    parts = _parts(whole["pre_tokenizer"], "pretokenizers")
    cuts = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split" and part["behavior"] == "Isolated"]
    level = parts[-1] if parts and parts[-1]["type"] == "ByteLevel" else {}
    cut = "" if not cuts and level.get("use_regex", True) else cuts[0] if len(cuts) == 1 and not level.get("use_regex", True) else None
    bare, wrapped = tokenizer.encode("a", special=False), tokenizer.encode("a")
    around = wrapped[: len(wrapped) - len(bare)]
    for wrong, what in (
        (model["type"] != "BPE" or model.get("byte_fallback") or not level, f"{model['type']} that is not byte-level"),
        (any(part["type"] != "NFC" for part in _parts(whole.get("normalizer"), "normalizers")), "a normalizer"),
        (level.get("add_prefix_space"), "a space before every text"),
        (len(parts) != len(cuts) + 1 or cut not in _CUTS, f"words cut by {cuts or [part['type'] for part in parts]}"),
        (bool(model.get("ignore_merges")) != (_CUTS.get(cut or "") == "llama-bpe"), f"ignore_merges = {model.get('ignore_merges')}"),
        (wrapped != [*around, *bare] or around not in ([], [bos]), "tokens around a text"),
    ):
        if wrong:
            raise Unsupported(f"{folder}: GGUF files need a tokenizer that llama.cpp supports, not one with {what}")
    added = whole.get("added_tokens") or []
    return Vocabulary(
        tokens={id: token for token, id in model["vocab"].items()} | {token["id"]: token["content"] for token in added},
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        special=frozenset(token["id"] for token in added if token["special"]),
        added=frozenset(token["id"] for token in added),
        cut=_CUTS[cut or ""],
        begins=bool(around),
        bos=bos,
        eos=tokenizer.vocabulary.id("eos_token"),
    )


def _parts(step: Any, inside: str) -> list[Any]:
    """The steps of a Sequence; [] for None, else the step itself."""
    return [] if step is None else step[inside] if step["type"] == "Sequence" else [step]


def _tokenizer(writer: Any, words: Vocabulary, size: int) -> None:
    kinds: Any = importlib.import_module("gguf").TokenType
    ids = range(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.cut)
    writer.add_token_list([words.tokens.get(id, f"[PAD{id}]") for id in ids])
    writer.add_token_types(
        [
            kinds.CONTROL if id in words.special
            else kinds.USER_DEFINED if id in words.added
            else kinds.NORMAL if id in words.tokens
            else kinds.UNUSED
            for id in ids
        ]
    )  # fmt: skip
    writer.add_token_merges(words.merges)
    if words.bos is not None:
        writer.add_bos_token_id(words.bos)
    if words.eos is not None:
        writer.add_eos_token_id(words.eos)
    writer.add_add_bos_token(words.begins)
    writer.add_add_eos_token(False)


def _write(path: Path, found: loader.Checkpoint, words: Vocabulary | None) -> None:
    gguf: Any = importlib.import_module("gguf")  # an optional package
    kinds = gguf.GGMLQuantizationType
    matrix = {"bfloat16": kinds.BF16, "float16": kinds.F16, "float32": kinds.F32}[name_of(found.dtype)]
    writer: Any = gguf.GGUFWriter(path, found.spec.family)
    _header(writer, found.spec, loader.read_config(found.path))
    if words is None:
        writer.add_tokenizer_model("none")
    else:
        _tokenizer(writer, words, found.spec.vocab)
    for write in (False, True):  # first the headers, then the numbers one by one
        for name, tensor in _tensors(found):
            data = np.ascontiguousarray(tensor.astype(found.dtype if tensor.ndim > 1 else np.float32)).view(np.uint8)
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
    layer, mixer = spec.layers[0], spec.attention[0]
    assert isinstance(layer.mlp, Mlp)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(len(spec.layers))
    writer.add_feed_forward_length(layer.mlp.hidden)
    writer.add_head_count(mixer.heads)
    writer.add_head_count_kv(mixer.kv_heads)
    writer.add_key_length(mixer.head_dim)
    writer.add_value_length(mixer.head_dim)
    assert layer.norm is not None
    writer.add_layer_norm_rms_eps(layer.norm.eps)
    writer.add_rope_dimension_count(mixer.head_dim)
    writer.add_rope_freq_base(_theta(config))
    writer.add_vocab_size(spec.vocab)


def _theta(config: Any) -> float:
    rope = getattr(config, "rope_parameters", None) or {}
    theta: Any = rope.get("rope_theta") or getattr(config, "rope_theta", 10000.0)
    return float(theta)


def _tensors(found: loader.Checkpoint) -> Iterator[tuple[str, Numbers]]:
    spec, layer = found.spec, found.spec.attention[0]
    assert layer.rotary is not None
    plain = _theta(loader.read_config(found.path)) ** (-np.arange(0, layer.head_dim, 2) / layer.head_dim)
    factors = plain / np.array(layer.rotary.frequencies)
    if not np.allclose(factors, 1):
        yield "rope_freqs.weight", factors.astype(np.float32)
    for name, source in found.sources.items():
        _, at, part, kind = name.split(".") if name not in TOP else ("", "", "", "")
        names = [f"blk.{at}.{one}.{kind}" for one in PARTS[part]] if part else [TOP[name]]
        for target, stored in zip(names, source.names, strict=True):
            tensor = found.tensors.read(stored)
            heads = {"attn_q": layer.heads, "attn_k": layer.kv_heads}.get(target.split(".")[-2], 0)
            if heads and spec.family == "llama":  # llama.cpp pairs neighbours, checkpoints pair the halves of a head
                tensor = tensor.reshape(heads, 2, layer.head_dim // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
            yield target, tensor
