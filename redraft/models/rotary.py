"""A config's rope parameters -> rotary frequencies, in float64.

Linear: Chen et al., Extending Context Window of Large Language Models via Positional Interpolation, 2023,
arXiv:2306.15595. YaRN: Peng et al., YaRN: Efficient Context Window Extension of Large Language Models, 2023,
arXiv:2309.00071. llama3: published by Meta with Llama 3.1 (Grattafiori et al., 2024, arXiv:2407.21783). longrope: Ding et al.,
LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens, 2024, arXiv:2402.13753. dynamic: NTK-aware scaling, described in YaRN's
appendix.
"""

from __future__ import annotations

import math
from typing import Any

from redraft.core.spec import Rotary
from redraft.errors import CheckpointError, Unsupported, shown
from redraft.models.config import Config

_KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
_FIELDS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate", "finetuned",
    "short_factor", "long_factor",
}  # fmt: skip
_POSITIVE = {
    "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "attention_factor",
}  # fmt: skip


def rotary(config: Config, head_dim: int) -> Rotary:
    """The frequencies of one head, in the order of `halves`. Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`
    (4). Unsupported names a kind or field of scaling that Redraft does not know."""
    rope = _parameters(config)
    kind = _kind(rope)
    if kind not in _KINDS:
        raise Unsupported(f"rope type {kind!r}; known: {', '.join(_KINDS)}")
    if unknown := sorted(set(rope) - _FIELDS):
        raise Unsupported(f"rope parameter {unknown[0]!r} of type {kind!r}")
    turned = turned_dims(config, head_dim)
    if head_dim % 2 or head_dim < 2:
        raise CheckpointError(f"head_dim = {head_dim}: rotary positions need an even number")
    plain = [float(rope["rope_theta"]) ** (-i / turned) for i in range(0, turned, 2)]
    made = _scaled(config, rope, plain)
    still = (head_dim - turned) // 2
    return Rotary((*made.frequencies, *[0.0] * still), made.scale, still) if still else made


def of_kind(config: Config, kind: str, base: tuple[str, float]) -> Config:
    """The config with the rope parameters of one kind of layers ("full_attention" or "sliding_attention"). base: a field of the config
    and its default, if they have no base. `rope_scaling` belongs to full attention."""
    given = getattr(config, "rope_parameters", None) or {}
    own = given.get(kind, {}) if isinstance(given, dict) else None
    more = vars(config).get("rope_scaling") if kind == "full_attention" else None
    for name, part in ((f"rope_parameters.{kind}", own), ("rope_scaling", more)):
        if not isinstance(part, dict) and (part is not None or name != "rope_scaling"):
            raise CheckpointError(f"{name} = {shown(part)}: must be an object")
    merged = {"rope_type": "default", **(own or {}), **(more or {})}
    if merged.get("rope_theta") is None:
        merged["rope_theta"] = getattr(config, base[0], None) or base[1]
    return Config(**{**vars(config), "rope_scaling": None, "rope_parameters": merged})


def _scaled(config: Config, rope: dict[str, Any], plain: list[float]) -> Rotary:
    """The plain frequencies of the rotated dimensions, scaled."""
    kind, theta = _kind(rope), float(rope["rope_theta"])
    if kind == "default":
        return Rotary(tuple(plain))
    if kind == "linear":
        return Rotary(tuple(f / _number(rope, kind, "factor") for f in plain))
    if kind == "dynamic":
        return _dynamic(config, rope, theta, 2 * len(plain))
    original = _original(config, rope)
    if kind == "longrope":
        return _longrope(config, rope, plain, original)
    if kind == "llama3":
        low, high, factor = (_number(rope, kind, name) for name in ("low_freq_factor", "high_freq_factor", "factor"))
        return Rotary(tuple(_llama3(f, factor, low, high, original) for f in plain))
    return _yarn(rope, plain, theta, original, float(config.max_position_embeddings))


def turned_dims(config: Config, head_dim: int) -> int:
    """The number of leading dimensions of a head that positions rotate. The others are pairs of frequency 0, see `halves`."""
    part = _parameters(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part <= 1:
        raise CheckpointError(f"partial_rotary_factor = {shown(part)}: must be above 0 and at most 1")
    turned = int(head_dim * part)
    if part < 1 and (turned % 2 or turned < 2):
        raise CheckpointError(f"partial_rotary_factor = {part} of head_dim = {head_dim}: {turned} dimensions; an even number is needed")
    return turned


def halves(turned: int, head_dim: int) -> list[int]:
    """The order of a head's dimensions in which the pairs (i, i + head_dim / 2) are those of its first `turned` dimensions, then pairs of
    the others. Scores do not depend on the order."""
    half, rest = turned // 2, (head_dim - turned) // 2
    return [*range(half), *range(turned, turned + rest), *range(half, turned), *range(turned + rest, head_dim)]


def context(config: Config) -> int:
    """The number of positions. Linear, dynamic: `factor` times max_position_embeddings. YaRN: the larger of `factor` times the original
    length and max_position_embeddings. llama3: as YaRN if max_position_embeddings is the original length, else max_position_embeddings.
    LongRoPE: max_position_embeddings."""
    rope, given = _parameters(config), int(config.max_position_embeddings)
    kind, factor = _kind(rope), float(rope.get("factor") or 1.0)
    if kind in ("linear", "dynamic"):
        return max(given, int(given * factor))
    original = _original(config, rope)
    if kind == "yarn" or (kind == "llama3" and given <= original):
        return max(given, int(original * factor))
    return given


def _kind(rope: dict[str, Any]) -> str:
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    return {"su": "longrope"}.get(kind, kind)


def _original(config: Config, rope: dict[str, Any]) -> float:
    """The length before scaling. The config's own field comes before the rope parameter, as in transformers."""
    name = "original_max_position_embeddings"
    return float(getattr(config, name, None) or rope.get(name) or config.max_position_embeddings)


def _parameters(config: Config) -> dict[str, Any]:
    """`rope_scaling` comes before `rope_parameters`, whose base then does not count either, as in transformers. CheckpointError names a
    field with a wrong value."""
    rope: dict[str, Any] = {}
    for place in ("rope_scaling", "rope_parameters"):
        if (given := getattr(config, place, None)) and not isinstance(given, dict):
            raise CheckpointError(f"{place} = {shown(given)}: must be an object")
        rope = rope or dict(given or {})
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = getattr(config, "rope_theta", None) or 10_000.0
    for name in _POSITIVE & rope.keys():
        value = rope[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-30 < value < 1e30):
            raise CheckpointError(f"rope parameter {name} = {shown(value)}: must be a positive number")
    return rope


def _number(rope: dict[str, Any], kind: str, name: str) -> float:
    if rope.get(name) is None:
        raise CheckpointError(f"rope type {kind!r} lacks {name!r}")
    return float(rope[name])


def _longest(config: Config) -> float:
    """The longest text of the engine. Scalings that depend on it are the same for all texts, so that no text changes as it grows."""
    return float(getattr(config, "max_model_len", None) or context(config))


def _dynamic(config: Config, rope: dict[str, Any], theta: float, dim: int) -> Rotary:
    factor, given = _number(rope, "dynamic", "factor"), float(config.max_position_embeddings)
    if dim <= 2:
        raise CheckpointError(f"rope type 'dynamic': {dim} rotated dimensions; more than 2 are needed")
    base = theta * (factor * max(_longest(config), given) / given - (factor - 1)) ** (dim / (dim - 2))
    return Rotary(tuple(base ** (-i / dim) for i in range(0, dim, 2)))


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 1e-30 < value < 1e30


def _longrope(config: Config, rope: dict[str, Any], plain: list[float], original: float) -> Rotary:
    name = "long_factor" if _longest(config) > original else "short_factor"
    factors = rope.get(name)
    if not isinstance(factors, list) or len(factors) != len(plain) or not all(_is_positive(one) for one in factors):
        raise CheckpointError(f"rope parameter {name} = {shown(factors)}: must be {len(plain)} positive numbers")
    factor, scale = float(rope.get("factor") or config.max_position_embeddings / original), rope.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return Rotary(tuple(f / one for f, one in zip(plain, factors, strict=True)), float(scale))


def _llama3(frequency: float, factor: float, low: float, high: float, original: float) -> float:
    """Scales by the number of turns in the original context: interpolated below `low`, kept above `high`, blended in between."""
    turns = original * frequency / (2 * math.pi)
    keep = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * (keep + (1 - keep) / factor)


def _yarn(rope: dict[str, Any], plain: list[float], theta: float, original: float, context: float) -> Rotary:
    factor = float(rope.get("factor") or context / original)
    dim = 2 * len(plain)

    def pair(turns: float) -> float:  # the (real) index of the pair that makes this many turns in the original context
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(rope.get("beta_fast") or 32.0), pair(rope.get("beta_slow") or 1.0)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = (last - first) or 0.001
    kept = [1 - min(max((i - first) / width, 0.0), 1.0) for i in range(len(plain))]
    frequencies = tuple(f * (keep + (1 - keep) / factor) for f, keep in zip(plain, kept, strict=True))

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scale = rope.get("attention_factor")
    if scale is None:
        above, below = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = magnitude(above) / magnitude(below) if above and below else magnitude(1.0)
    return Rotary(frequencies, float(scale))
