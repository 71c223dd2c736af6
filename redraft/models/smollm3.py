"""SmolLM3: Llama with layers that positions do not rotate. Bakouch, Ben Allal, Lozhkov, Tazi, Tunstall et al., SmolLM3: smol,
multilingual, long-context reasoner, 2025."""

from __future__ import annotations

from redraft.core.spec import ModelSpec
from redraft.errors import CheckpointError, shown
from redraft.models import llama
from redraft.models.config import Config, Family
from redraft.models.llama import decoder, windows

DEFAULTS = {
    **llama.DEFAULTS, "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6, "tie_word_embeddings": True,
    "no_rope_layers": None, "no_rope_layer_interval": 4, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 0,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    """`no_rope_layers` holds 1 for a layer that is rotated, 0 for one that is not. Only the latter have a window, if there is one."""
    count, interval = config.num_hidden_layers, config.no_rope_layer_interval
    turned = config.no_rope_layers
    if turned is None:
        turned = [(i + 1) % interval != 0 for i in range(count)]
    if not isinstance(turned, list) or len(turned) != count or any(one not in (0, 1) for one in turned):
        raise CheckpointError(f"no_rope_layers = {shown(turned)}: 0 or 1 for each of the {count} layers is needed")
    window = config.sliding_window if config.use_sliding_window else None
    named = getattr(config, "layer_types", None) is not None
    if named and window is None and "sliding_attention" in config.layer_types:
        raise CheckpointError(f"layer_types = {shown(config.layer_types)}: sliding_attention, but use_sliding_window is false")
    return decoder(
        config,
        family="smollm3",
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        turned=[bool(one) for one in turned],
        windows=windows(config) if named else [None if one else window for one in turned],
        known=("no_rope_layers",),
    )


FAMILY = Family("smollm3", DEFAULTS, spec, eos=128001)
