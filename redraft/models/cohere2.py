"""Cohere's Command R7B and A: three layers with a window for each without, which positions do not rotate. Cohere, Command A: An
Enterprise-Ready Large Language Model, 2025, arXiv:2504.00698."""

from __future__ import annotations

from redraft.core.spec import ModelSpec
from redraft.models import cohere
from redraft.models.cohere import command
from redraft.models.config import Config, Family
from redraft.models.llama import SLIDING, kinds_of_layers

DEFAULTS = {**cohere.DEFAULTS, "sliding_window": 4096, "sliding_window_pattern": 4, "rope_theta": 10_000.0}


def spec(config: Config) -> ModelSpec:
    kinds = kinds_of_layers(config, lambda i: (i + 1) % config.sliding_window_pattern != 0)
    slides = [kind == SLIDING for kind in kinds]
    return command(config, "cohere2", windows=[config.sliding_window if one else None for one in slides], turned=slides)


FAMILY = Family("cohere2", DEFAULTS, spec, eos=255001)
