"""ModelSpec.memories: the layers grouped by the form of their memory."""

from __future__ import annotations

from dataclasses import replace

from redraft.core.spec import Attention, CrossAttention, LayerSpec, MemoryGroup, Mixer, Mlp, ModelSpec, Norm, Recurrent, WeightSource

WIDE, NARROW = Attention(8, 4, 16), Attention(8, 2, 16)


def spec(*mixers: Mixer) -> ModelSpec:
    return ModelSpec(9, 8, 64, tuple(LayerSpec(mixer, Mlp(8)) for mixer in mixers), Norm(), True, lambda name: WeightSource((name,)))


def test_layers_are_grouped_by_kind_shape_and_window() -> None:
    local = replace(WIDE, window=7)
    mixers = (WIDE, Recurrent((3, 5)), local, NARROW, replace(WIDE, heads=4), CrossAttention(8, 4, 16), Recurrent((3, 5)), Recurrent((4,)))
    assert spec(*mixers).memories() == (
        MemoryGroup("pages", (0, 4), (4, 16)),
        MemoryGroup("state", (1, 6), (3, 5)),
        MemoryGroup("pages", (2,), (4, 16), 7),
        MemoryGroup("pages", (3,), (2, 16)),
        MemoryGroup("static", (5,), (4, 16)),
        MemoryGroup("state", (7,), (4,)),
    )


def test_pages_are_those_of_the_layers_with_attention() -> None:
    model = spec(Recurrent((3,)), WIDE, Recurrent((3,)), replace(WIDE, window=7))
    assert model.attention == (WIDE, replace(WIDE, window=7)) and (model.kv_heads, model.head_dim) == (4, 16)
