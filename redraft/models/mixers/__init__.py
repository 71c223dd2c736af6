"""How a layer mixes rows: one file for each kind of mixer. So far there is only attention. A backend names the kinds that it computes."""

from __future__ import annotations

from typing import Any, Protocol

from redraft.core.spec import Attention, ModelSpec
from redraft.errors import Unsupported
from redraft.models.mixers.attention import attention
from redraft.ops.arrays import Tensor
from redraft.ops.backend import Backend, LayerWeights


class Mix(Protocol):
    """x [T, hidden], normed -> [T, hidden]. index: the layer's number in `pool`, the memory of its group."""

    def __call__(self, x: Tensor, index: int, mixer: Any, weights: LayerWeights, backend: Backend, pool: Any, plan: Any) -> Tensor: ...


MIXERS: dict[type, Mix] = {Attention: attention}


def check(spec: ModelSpec, backend: Backend) -> None:
    """Raises Unsupported, in one line, if the engine cannot serve this model on this backend."""
    for i, layer in enumerate(spec.layers):
        kind = type(layer.mixer)
        if kind not in backend.mixers or kind not in MIXERS:
            raise Unsupported(f"layer {i}: backend {backend.name} does not compute {kind.__name__}")
    shapes = {group.shape: group.layers[0] for group in reversed(spec.memories()) if group.kind == "pages"}
    if len(shapes) != 1:
        wanted = "; ".join(f"layer {layer}: {heads} kv heads of {size}" for (heads, size), layer in reversed(shapes.items()))
        raise Unsupported(f"the layers' pages must have one shape, not {wanted or 'none at all'}")
