"""A small Llama with the target's tokens, which `--draft draft-model:model=FOLDER` takes.

Ofir Zafrir, Igor Margulis, Dorin Shteyman, et al.: FastDraft, 2024, arXiv 2411.11055; Raghavv Goel, Mukul Gagrani, et al.: Direct
Alignment of Draft Model, 2024, arXiv 2403.00858.

1. The embedding of a token is that of the target, brought to the width of the draft by a matrix; the head is that of the target, behind a
   matrix from the draft's width. The file holds the products, so that the vocabulary adds next to no weights to train, and a token that
   training never met still has an embedding and a row of the head.
2. Layers of Llama's form in between, which start as the identity.
3. Loss: cross-entropy to the target's distributions of what it wrote itself.

Differs: it is not trained on other texts first; there is no time for these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from redraft.errors import InvalidInput
from redraft.options import Options, number
from redraft_train.heads.head import Head, Window
from redraft_train.heads.layer import Layer, RMSNorm, Seen
from redraft_train.target import Shape, Target, to_numpy

HEAD_DIM = 64


@dataclass(frozen=True)
class Draft(Options):
    """width: of the hidden states, a multiple of 64; layers; group: attention heads, 64 wide each, for each head of keys and values."""

    width: int = number(256, ge=HEAD_DIM, multiple_of=HEAD_DIM)
    layers: int = number(2, ge=1, le=16)
    group: int = number(2, ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width // HEAD_DIM % self.group:
            raise InvalidInput(f"draft:group={self.group}: must divide {self.width // HEAD_DIM}, the number of heads of width={self.width}")

    def head(self, target: Target, kept: NDArray[Any]) -> DraftModel:
        return DraftModel(self, target, kept)


class DraftModel(Head):
    """`export` gives the tensors of a Llama checkpoint, `about` its config.json. It has the whole vocabulary, and is trained on `kept`."""

    method = "draft-model"
    first = 0

    def __init__(self, options: Draft, target: Target, kept: NDArray[Any]) -> None:
        super().__init__(target, kept)
        self.head.factor, self.head.limit = 1.0, None  # a Llama has neither
        width, heads, base = options.width, options.width // HEAD_DIM, target.shape
        self.target, self.options = target, options
        self.shape = Shape(width, heads, heads // options.group, HEAD_DIM, 64 * round(width * 8 / 3 / 64), base.rope_theta, base.eps)
        self.scale = target.scale / float(target.final_norm.square().mean().sqrt())  # to a size of 1
        self.down = nn.Parameter(_axes(target.embedding, width))
        self.up = nn.Parameter(_axes(target.head, width).T * float(target.final_norm.square().mean().sqrt()))
        self.stack = nn.ModuleList(Layer(self.shape) for _ in range(options.layers))
        self.norm = RMSNorm(width, self.shape.eps)

    def states(self, window: Window) -> list[Tensor]:
        x = F.linear(self.embedded(window.tokens) * self.scale, self.down)
        for layer in self.stack:
            x = layer(x, Seen(window.text, window.positions))
        return [F.linear(self.norm(x), self.up)]

    @torch.no_grad()
    def export(self) -> dict[str, NDArray[Any]]:
        embedding = self.target.embedding.float() @ (self.down * self.scale).T
        found = {
            "model.embed_tokens.weight": embedding,
            "lm_head.weight": self.target.head.float() @ self.up,
            "model.norm.weight": self.norm.weight,
        }
        for i, layer in enumerate(self.stack):
            found.update({f"model.layers.{i}.{name}": parameter for name, parameter in layer.named_parameters()})
        return {name: to_numpy(tensor.to(torch.bfloat16)) for name, tensor in found.items()}

    def about(self) -> dict[str, Any]:
        shape = self.shape
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": self.target.spec.vocab,
            "hidden_size": shape.hidden, "num_hidden_layers": len(self.stack), "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "intermediate_size": shape.intermediate,
            "hidden_act": "silu", "rms_norm_eps": shape.eps, "rope_theta": shape.rope_theta, "tie_word_embeddings": False,
            "max_position_embeddings": self.target.spec.context, "attention_bias": False, "mlp_bias": False,
        }  # fmt: skip


SAMPLE = 8192  # rows of a matrix whose axes are measured


def _axes(rows: Tensor, width: int) -> Tensor:
    """[width, hidden]: the principal axes of some rows, the largest first; orthonormal. If there are fewer, the others are 0."""
    sample = rows[:: max(1, len(rows) // SAMPLE)].float()
    _, vectors = torch.linalg.eigh(sample.T @ sample)
    axes = vectors.flip(-1).T[:width]
    return F.pad(axes, (0, 0, 0, width - len(axes))).contiguous()
