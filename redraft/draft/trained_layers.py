"""Decoder layers that were trained for a model, as a Runner of their own, with rows of the model's head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redraft.core.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm, Rotary, WeightSource
from redraft.core.tree import I64
from redraft.draft.heads import Arrays
from redraft.draft.trained_file import TrainedFile
from redraft.errors import CheckpointError, InvalidInput, OutOfMemory
from redraft.models import loader, memory
from redraft.models.runner import Runner
from redraft.models.trained import Trained
from redraft.ops.arrays import numpy_dtype
from redraft.ops.backend import LinearWeights

SHARE = 0.5  # the pool of the layers takes at most this part of what is free
NO_MLP = 32  # the width of an MLP of zeros, of a layer that has only attention


@dataclass(frozen=True, eq=False)
class TrainedLayers:
    """runner: the layers with their own memory; its head has the rows of the target's head for the tokens `kept`, ascending, and its
    embedding is the target's; arrays: what else the file holds; bytes: of weights and memory."""

    runner: Runner
    kept: I64
    arrays: Arrays
    bytes: int

    @classmethod
    def load(cls, method: TrainedFile, target: Runner) -> TrainedLayers:
        """Raises InvalidInput if there is no file or it was made for another model, CheckpointError if it does not fit, OutOfMemory."""
        trained, path, backend, spec = method.load(target), method.path, target.backend, target.spec
        arrays = Arrays(trained, path, target)
        made = described(trained, path, spec)
        kept, whole = arrays.kept(target.weights.head.outs), target.weights.head
        blocks = target.memory.paged.blocks
        if not whole.meta:
            free = memory.limits(backend.device)
            blocks = min(blocks, int(free * SHARE) // backend.block_bytes(made))
            if blocks < 1:
                raise OutOfMemory(f"{path}: its cache does not fit beside the model: free {memory.size(free)}")
        if arrays.has("rows"):
            head = arrays.packed(arrays.get("rows", len(kept), spec.hidden))
        else:
            head = whole if whole.meta or len(kept) == whole.outs else backend.pack(whole.rows(kept))
        tensors = {"final_norm.weight": backend.place(arrays.get("norm.weight", spec.hidden)), "embed": target.weights.embed}
        linears: dict[str, LinearWeights] = {"head": head}
        for i, layer in enumerate(made.layers):
            _add(arrays, layer, spec.hidden, "layer" if not i else f"layer{i}", f"layers.{i}", tensors, linears)
        runner = Runner(made, loader.assemble(made, loader.Parts(tensors, linears)), backend, blocks, sharing=target.table.sharing)
        return cls(runner, kept, arrays, _bytes(trained, target, made, blocks))


def max_bytes(method: TrainedFile, target: Runner) -> int:
    """The most bytes that the layers of this file take, with their memory; 0 if there is no such file: `load` says why."""
    try:
        trained = method.read()
        made = described(trained, method.path, target.spec)
    except (CheckpointError, InvalidInput):
        return 0
    return _bytes(trained, target, made, target.memory.paged.blocks)


def _bytes(trained: Trained, target: Runner, made: ModelSpec, blocks: int) -> int:
    numbers = sum(one.size for one in trained.arrays.values()) + len(trained.arrays.get("kept", ())) * target.spec.hidden
    return int(numbers) * numpy_dtype(target.backend.dtype).itemsize + blocks * target.backend.block_bytes(made)


def described(trained: Trained, path: Path | None, target: ModelSpec) -> ModelSpec:
    """The layers of a file, as a model of their own."""
    about: Mapping[str, Any] = trained.about
    try:
        heads, kv_heads, size, wide = (int(about[name]) for name in ("heads", "kv_heads", "head_dim", "intermediate"))
        theta, eps, count = float(about["rope_theta"]), float(about["eps"]), int(about.get("layers", 1))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata do not describe a layer: {error!r}") from None
    if min(heads, kv_heads, size, wide, count) < 1 or heads % kv_heads or size % 2 or not theta > 0 or not eps >= 0:
        raise CheckpointError(f"{path}: no layer has {heads} heads, {kv_heads} kv heads, head_dim {size}, rope_theta {theta}, eps {eps}")
    rotary, norm = Rotary(tuple(theta ** (-i / (size // 2)) for i in range(size // 2))), Norm("rms", eps)
    mlp = Mlp(wide if "layer.mlp.up_proj.weight" in trained.arrays else NO_MLP)
    return ModelSpec(
        target.vocab, target.hidden, target.context, (LayerSpec(Attention(heads, kv_heads, size, rotary), mlp, norm),) * count, norm,
        False, lambda name: WeightSource((name,)), logit_scale=target.logit_scale, logit_softcap=target.logit_softcap,
    )  # fmt: skip


def _add(
    arrays: Arrays, layer: LayerSpec, hidden: int, name: str, at: str, tensors: dict[str, Any], linears: dict[str, LinearWeights]
) -> None:
    """Adds the weights of layer `name` of a file under their canonical names, which begin with `at`."""
    mixer, mlp, place = layer.mixer, layer.mlp, arrays.backend.place
    assert isinstance(mixer, Attention) and isinstance(mlp, Mlp)
    queries, keys = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim

    def get(part: str, *shape: int) -> Any:
        return arrays.get(f"{name}.{part}.weight", *shape)

    parts = (get(f"self_attn.{part}_proj", rows, hidden) for part, rows in (("q", queries), ("k", keys), ("v", keys)))
    linears[f"{at}.qkv"] = arrays.packed(*parts)
    linears[f"{at}.out"] = arrays.packed(get("self_attn.o_proj", hidden, queries))
    tensors[f"{at}.attn_norm.weight"] = place(get("input_layernorm", hidden))
    if arrays.has(f"{name}.mlp.up_proj.weight"):
        both = (get(f"mlp.{part}_proj", mlp.hidden, hidden) for part in ("gate", "up"))
        linears[f"{at}.up"] = arrays.packed(*both, gated=True)
        linears[f"{at}.down"] = arrays.packed(get("mlp.down_proj", hidden, mlp.hidden))
        tensors[f"{at}.mlp_norm.weight"] = place(get("post_attention_layernorm", hidden))
    else:  # attention alone
        zeros = np.zeros((mlp.hidden, hidden), arrays.dtype)
        linears[f"{at}.up"], linears[f"{at}.down"] = arrays.packed(zeros, zeros, gated=True), arrays.packed(zeros.T)
        tensors[f"{at}.mlp_norm.weight"] = place(np.ones(hidden, arrays.dtype))
