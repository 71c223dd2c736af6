"""Gemma 3, the text model: Gemma 2 with norms of queries and keys in place of the cap of scores, five layers with a window for each
without, and positions of their own in these. Gemma Team, Gemma 3 Technical Report, 2025, arXiv:2503.19786."""

from __future__ import annotations

from dataclasses import replace

from redraft.core.spec import ModelSpec, WeightSource
from redraft.errors import CheckpointError, shown
from redraft.models import gemma2
from redraft.models.config import Config, Family, filled
from redraft.models.gemma2 import gemma
from redraft.models.llama import FULL, SLIDING, kinds_of_layers, refuse, with_rotary
from redraft.models.rotary import of_kind, rotary

DEFAULTS = {
    **gemma2.DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072, "final_logit_softcapping": None,
    "attn_logit_softcapping": None, "sliding_window_pattern": 6, "rope_theta": None,
}  # fmt: skip


def spec(config: Config) -> ModelSpec:
    refuse(config, ("attn_logit_softcapping",))
    kinds = kinds_of_layers(config, lambda i: (i + 1) % config.sliding_window_pattern != 0)
    made = gemma(of_kind(config, FULL, ("rope_theta", 1e6)), "gemma3_text", kinds, qk_norm=True)
    near = rotary(of_kind(config, SLIDING, ("rope_local_base_freq", 10_000.0)), config.head_dim)
    return replace(with_rotary(made, near, kinds), context=config.max_position_embeddings)


def text_of(config: Config) -> ModelSpec:
    """The text model of a checkpoint that also has a vision encoder."""
    if not isinstance(config.text_config, dict):
        raise CheckpointError(f"text_config = {shown(config.text_config)}: must be an object")
    made = spec(filled(Config(**config.text_config), DEFAULTS))

    def source(name: str) -> WeightSource:
        found = made.source(name).names
        if name == "head":
            return WeightSource(found, otherwise=WeightSource(("language_model.lm_head.weight",)))
        bare = [one.removeprefix("model.") for one in found]
        new, old = (tuple(f"{prefix}.{one}" for one in bare) for prefix in ("model.language_model", "language_model.model"))
        return replace(made.source(name), names=new, otherwise=replace(made.source(name), names=old))

    others = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
    return replace(made, source=source, family="gemma3", prefix="", others=others)


FAMILY = Family("gemma3_text", DEFAULTS, spec, eos=1)
WITH_VISION = Family("gemma3", {"text_config": None, "tie_word_embeddings": True}, text_of, eos=1)
