"""What the trained parts read of the model that they draft for: embedding, head, final norm and layers, as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from redraft.core.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm
from redraft.ops.backend import Linear, Weights
from redraft.ops.torch_arrays import as_tensor


class Shape(NamedTuple):
    """The sizes of a decoder layer of Llama's form."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rope_theta: float
    eps: float


@dataclass(frozen=True, eq=False)
class Target:
    """A frozen model. embedding, head: [V, hidden] as stored, the same tensor if tied; final_norm: [hidden], gains of the final norm;
    weights: all of the model, numpy arrays (see loader.read)."""

    spec: ModelSpec
    embedding: Tensor
    head: Tensor
    final_norm: Tensor
    weights: Weights

    @classmethod
    def of(cls, spec: ModelSpec, weights: Weights) -> Target:
        head = weights.head
        assert isinstance(head, Linear), "weights that loader.read makes without a backend"
        rows = as_tensor(head.weight)
        embedding = rows if spec.tied else as_tensor(cast(Any, weights.embed))
        return cls(spec, embedding, rows, as_tensor(weights.final_norm.weight).float(), weights)

    @property
    def scale(self) -> float:
        """The size of a state behind the final norm over that of a token's embedding, both as root mean squares. An input that is
        multiplied by it learns as fast as the state."""
        sample = self.embedding[:: max(1, len(self.embedding) // 4096)].float()
        return float(self.final_norm.square().mean().sqrt() / sample.square().mean().sqrt().clamp_min(1e-9))

    @property
    def shape(self) -> Shape:
        """Of a layer that attends and has the sizes of the last one of the target."""
        layer = self.spec.layers[-1]
        mixer, mlp = layer.mixer, layer.mlp
        assert isinstance(mixer, Attention)
        wide = mlp.hidden if isinstance(mlp, Mlp) else mlp.mlp.hidden
        norm = layer.norm or layer.post_norm or Norm()
        return Shape(self.spec.hidden, mixer.heads, mixer.kv_heads, mixer.head_dim, wide, _theta(mixer) or 10_000.0, norm.eps)

    def layer(self, index: int) -> dict[str, Tensor] | None:
        """The weights of a layer under the names of a Llama, float32; None if the layer has another form."""
        spec, held = self.spec.layers[index], self.weights.layers[index]
        if not _is_llama(spec) or not isinstance(held.qkv, Linear):
            return None
        mixer, mlp = spec.mixer, spec.mlp
        assert isinstance(mixer, Attention) and isinstance(mlp, Mlp) and held.attn_norm and held.mlp_norm
        q, k = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        queries, keys, values = _dense(held.qkv).split([q, k, k])
        gate, up = _dense(held.up).split(mlp.hidden)
        return {
            "input_layernorm.weight": as_tensor(held.attn_norm.weight).float(),
            "self_attn.q_proj.weight": queries,
            "self_attn.k_proj.weight": keys,
            "self_attn.v_proj.weight": values,
            "self_attn.o_proj.weight": _dense(held.out),
            "post_attention_layernorm.weight": as_tensor(held.mlp_norm.weight).float(),
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": _dense(held.down),
        }


def _dense(linear: Any) -> Tensor:
    assert isinstance(linear, Linear)
    return as_tensor(linear.weight).float()


def _theta(mixer: Attention) -> float | None:
    """The base of the rotary frequencies, None if they are not the powers of one."""
    rotary = mixer.rotary
    if rotary is None or rotary.dim != mixer.head_dim or rotary.scale != 1 or rotary.still or len(rotary.frequencies) < 2:
        return None
    theta = float(rotary.frequencies[1] ** (-len(rotary.frequencies)))
    powers = theta ** -(np.arange(len(rotary.frequencies)) / len(rotary.frequencies))
    return theta if np.allclose(powers, rotary.frequencies, rtol=1e-5) else None


def _is_llama(layer: LayerSpec) -> bool:
    mixer, mlp, norm = layer.mixer, layer.mlp, layer.norm
    return (
        isinstance(mixer, Attention) and isinstance(mlp, Mlp) and norm is not None and norm.kind == "rms"
        and layer.post_norm is None and not layer.parallel and layer.residual == 1
        and _theta(mixer) is not None and mixer.qk_norm is None and mixer.scale is None and mixer.softcap is None
        and not (mixer.qkv_bias or mixer.out_bias or mixer.sink_logits)
        and mlp.gated and not mlp.bias and mlp.activation == "silu" and mlp.limit is None and not mlp.shift
    )  # fmt: skip


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The same numbers as an array; bfloat16 stays bfloat16."""
    from redraft.ops.arrays import BFLOAT16

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()
