"""OLMo 3: OLMo 2 with windows in three of four layers, whose positions are not scaled. Olmo Team, Olmo 3, 2025, arXiv:2512.13961."""

from __future__ import annotations

from redraft.core.spec import ModelSpec
from redraft.models import olmo2
from redraft.models.config import Config, Family
from redraft.models.llama import FULL, SLIDING, kinds_of_layers, with_rotary
from redraft.models.olmo2 import olmo
from redraft.models.rotary import of_kind, rotary

DEFAULTS = {**olmo2.DEFAULTS, "sliding_window": 4096, "rope_theta": None}


def spec(config: Config) -> ModelSpec:
    kinds = kinds_of_layers(config, lambda i: (i + 1) % 4 != 0)
    windows = [config.sliding_window if kind == SLIDING else None for kind in kinds]
    base = ("rope_theta", 500_000.0)
    made = olmo(of_kind(config, FULL, base), "olmo3", windows=windows)
    return with_rotary(made, rotary(of_kind(config, SLIDING, base), made.head_dim), kinds)


FAMILY = Family("olmo3", DEFAULTS, spec, eos=50279)
