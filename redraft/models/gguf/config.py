"""The metadata of a GGUF file -> the config of its family, and the spec with the file's own tensor names.

Keys of an architecture that change the network and are not understood are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from redraft.core.spec import Attention, LayerSpec, ModelSpec, Norm
from redraft.errors import CheckpointError, Unsupported, shown
from redraft.models.config import Config
from redraft.models.gemma2 import CAPS
from redraft.models.gguf import names
from redraft.models.gguf.file import Contents
from redraft.models.gguf.vocabulary import ends

# keys after the architecture's name
_SIZES = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
}  # fmt: skip
_GPT2 = {
    "context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer", "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
}  # fmt: skip
_ROPE = {
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
_UNDERSTOOD = {
    *_SIZES, *_ROPE, "vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.causal",
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "expert_count", "expert_used_count", "tensor_data_layout",
}  # fmt: skip
_GEMMA = {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "rope.freq_base_swa"}
_ALSO = {"gemma2": _GEMMA, "gemma3": _GEMMA}  # understood in these architectures only
_COUNTED = ("block_count",)  # each has tensors of its own
_LARGEST = (1 << 24) - 1  # context lengths reach 10^7
_SAMPLING = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
    "xtc_probability": "xtc_probability", "xtc_threshold": "xtc_threshold", "mirostat": "mirostat", "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}  # fmt: skip
_SCALINGS = ("none", "linear", "yarn")


def config(found: Contents) -> Config:
    """The config that the family's config.json would give. `dtype` is that of the weights, bfloat16 if they are quantized."""
    architecture = found.fields.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise Unsupported(f"{found.path}: unknown architecture {shown(architecture)}; known: {', '.join(_FAMILIES)}")
    keys = _Keys(found, architecture)
    if names.EMBEDDING not in found.records:
        raise CheckpointError(f"{found.path}: missing tensor {names.EMBEDDING}")
    try:
        keys.check()
        made = _FAMILIES[architecture](keys)
    except Exception as error:  # a family's own checks may raise anything
        if isinstance(error, (CheckpointError, Unsupported)):
            raise
        raise CheckpointError(f"{found.path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
    made.dtype = _dtype(found)
    return made


def spec(found: Contents, plain: ModelSpec) -> ModelSpec:
    """The spec of the file's config with the file's tensor names, and with the frequencies that the file scales by a tensor."""
    made = replace(plain, source=lambda name: names.source(plain, name), prefix="")
    if made.final_norm.above_one:  # files hold the gains themselves
        made = _with_gains(made)
    factors = found.records.get(names.ROPE)
    if factors is None:
        return made
    from redraft.models.gguf.file import decode

    scale = np.concatenate([numbers for _, numbers in decode(factors)]).ravel().astype(np.float64)
    return replace(made, layers=tuple(_scaled(found, layer, scale) for layer in made.layers))


def _with_gains(spec: ModelSpec) -> ModelSpec:
    def own(norm: Norm | None) -> Norm | None:
        return None if norm is None else replace(norm, above_one=False)

    layers = []
    for layer in spec.layers:
        mixer = layer.mixer
        assert isinstance(mixer, Attention)
        mixer = replace(mixer, qk_norm=own(mixer.qk_norm))
        layers.append(replace(layer, mixer=mixer, norm=own(layer.norm), post_norm=own(layer.post_norm)))
    return replace(spec, layers=tuple(layers), final_norm=replace(spec.final_norm, above_one=False))


def _scaled(found: Contents, layer: LayerSpec, scale: np.ndarray[Any, np.dtype[np.float64]]) -> LayerSpec:
    mixer = layer.mixer
    if not isinstance(mixer, Attention) or mixer.rotary is None:
        raise Unsupported(f"{found.path}: {names.ROPE} for layers without rotary positions")
    rotary = mixer.rotary
    if len(scale) != len(rotary.frequencies) or not (np.isfinite(scale) & (scale > 0)).all():
        raise CheckpointError(f"{found.path}: {names.ROPE} needs {len(rotary.frequencies)} positive numbers, one for each pair")
    frequencies = tuple(f / float(s) for f, s in zip(rotary.frequencies, scale, strict=True))
    return replace(layer, mixer=replace(mixer, rotary=replace(rotary, frequencies=frequencies)))


def sampling(found: Contents) -> dict[str, Any]:
    """The metadata `general.sampling.*` as fields of generation_config.json."""
    start, fields = "general.sampling.", found.fields
    return {to: _short(fields[start + name]) for name, to in _SAMPLING.items() if start + name in fields}


def _short(value: Any) -> Any:
    """The shortest decimal of a float32, which is what was written before it was rounded."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


class _Keys:
    """The metadata of one architecture, with checked types."""

    def __init__(self, found: Contents, architecture: str) -> None:
        self.found, self.architecture = found, architecture

    def get(self, key: str, default: Any = None) -> Any:
        return self.found.fields.get(f"{self.architecture}.{key}", default)

    def _wrong(self, key: str, allowed: str) -> CheckpointError:
        return CheckpointError(f"{self.found.path}: {self.architecture}.{key} = {shown(self.get(key))}: {allowed}")

    def check(self) -> None:
        """Unsupported names a key that would change the network. Zero and false switch a feature off."""
        start, understood = f"{self.architecture}.", _UNDERSTOOD | _ALSO.get(self.architecture, set())
        for name, value in self.found.fields.items():
            key = name.removeprefix(start)
            if name.startswith(start) and key not in understood and not (isinstance(value, (bool, int, float)) and not value):
                raise Unsupported(f"{self.found.path}: metadata {name if name.isprintable() else shown(name)} = {shown(value)}")
        if not self.get("attention.causal", True):
            raise Unsupported(f"{self.found.path}: metadata {start}attention.causal = False")

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer. Arrays give one for each layer; they must agree."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(value):
            if (value != value[0]).any():
                raise Unsupported(f"{self.found.path}: {self.architecture}.{key} differs from layer to layer")
            value = int(value[0])
        if value is None:
            raise CheckpointError(f"{self.found.path}: metadata {self.architecture}.{key} is missing")
        most = len(self.found.records) if key in _COUNTED else _LARGEST
        if type(value) is not int or not 0 < value <= most:
            raise self._wrong(key, f"must be an integer from 1 to {most}{', the number of tensors' * (key in _COUNTED)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.found.path}: metadata {self.architecture}.{key} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self._wrong(key, "must be a positive number")
        return float(_short(value))

    @property
    def common(self) -> dict[str, Any]:
        """Fields that all families have."""
        found, fields = self.found, self.found.fields
        rows = found.records[names.EMBEDDING].shape[0]
        tokens = fields.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list) and len(tokens) > rows:
            raise CheckpointError(f"{found.path}: {len(tokens)} tokens, but {names.EMBEDDING} has {rows} rows")
        return {
            "vocab_size": rows,
            "tie_word_embeddings": names.HEAD not in found.records,
            "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": list(ends(found)),
        }

    def has(self, tensor: str) -> bool:
        return tensor in self.found.records

    def decoder(self) -> dict[str, Any]:
        """Fields of the families with Llama's layers."""
        fields = {field: self.size(key) for key, field in _SIZES.items()}
        heads = fields["num_attention_heads"]
        head_dim = self.size("attention.key_length", fields["hidden_size"] // heads or None)
        queries = self.found.records.get("blk.0.attn_q.weight")
        if queries is not None and queries.shape[0] != heads * head_dim:
            what = f"{heads} heads of {head_dim}"
            raise CheckpointError(f"{self.found.path}: the metadata has {what}, blk.0.attn_q.weight {queries.shape[0]} rows")
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.size(key, head_dim) != head_dim:
                raise Unsupported(f"{self.found.path}: {self.architecture}.{key} = {self.size(key)}: only {head_dim}, the head's size")
        return {
            **self.common,
            **fields,
            "num_key_value_heads": self.size("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "hidden_act": "silu",
            **self._rope(),
        }

    def _rope(self) -> dict[str, Any]:
        theta = self.number("rope.freq_base", 10_000.0)
        kind = self.get("rope.scaling.type", "linear" if self.get("rope.scale_linear") else "none")
        if kind not in _SCALINGS:
            raise Unsupported(f"{self.found.path}: {self.architecture}.rope.scaling.type = {shown(kind)}; known: {', '.join(_SCALINGS)}")
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 1.0) if kind == "linear" else 1.0)
        if kind == "linear" and factor != 1:
            rope |= {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            original = self.size("rope.scaling.original_context_length", self.size("context_length"))
            magnitude = 0.1 * float(np.log(factor)) + 1.0 if factor > 1 else 1.0
            magnitude *= self.number("rope.scaling.attn_factor", 1.0) * self.number("rope.scaling.yarn_attn_factor", 1.0)
            if (mixed := self.number("rope.scaling.yarn_ext_factor", 1.0)) != 1.0:
                raise Unsupported(f"{self.found.path}: {self.architecture}.rope.scaling.yarn_ext_factor = {mixed}: only 1 is supported")
            rope |= {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                "beta_fast": self.number("rope.scaling.yarn_beta_fast", 32.0),
                "beta_slow": self.number("rope.scaling.yarn_beta_slow", 1.0),
                "attention_factor": magnitude,
            }
        return {"rope_parameters": rope}


def _llama(keys: _Keys) -> Config:
    """Llama, Mistral without its window, and Mixtral: llama.cpp calls all of them llama."""
    if keys.get("expert_count"):
        experts = {"num_local_experts": keys.size("expert_count"), "num_experts_per_tok": keys.size("expert_used_count")}
        router = keys.found.records.get("blk.0.ffn_gate_inp.weight")
        if router is None or router.shape[0] != experts["num_local_experts"] or experts["num_experts_per_tok"] > router.shape[0]:
            raise CheckpointError(f"{keys.found.path}: {experts} do not fit the tensor blk.0.ffn_gate_inp.weight")
        return Config(architectures=["MixtralForCausalLM"], sliding_window=None, **keys.decoder(), **experts)
    return Config(
        architectures=["LlamaForCausalLM"],
        attention_bias=keys.has("blk.0.attn_q.bias"),
        mlp_bias=keys.has("blk.0.ffn_down.bias"),
        **keys.decoder(),
    )


def _qwen2(keys: _Keys) -> Config:
    fields = keys.decoder()
    if (head_dim := fields.pop("head_dim")) * fields["num_attention_heads"] != fields["hidden_size"]:
        raise Unsupported(f"{keys.found.path}: qwen2.attention.key_length = {head_dim}: only embedding_length / head_count")
    return Config(architectures=["Qwen2ForCausalLM"], use_sliding_window=False, **fields)


def _qwen3(keys: _Keys) -> Config:
    bias = keys.has("blk.0.attn_q.bias")
    return Config(architectures=["Qwen3ForCausalLM"], use_sliding_window=False, attention_bias=bias, **keys.decoder())


def _gemma2(keys: _Keys) -> Config:
    caps = {name: keys.number(name) if keys.get(name) else None for name in CAPS}
    return Config(architectures=["Gemma2ForCausalLM"], **_gemma(keys, 46), **caps)


def _gemma3(keys: _Keys) -> Config:
    fields = _gemma(keys, 62)
    near = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10_000.0)}
    fields["rope_parameters"] = {"full_attention": fields["rope_parameters"], "sliding_attention": near}
    return Config(architectures=["Gemma3ForCausalLM"], **fields)


def _gemma(keys: _Keys, largest: int) -> dict[str, Any]:
    """largest: the number of layers of the 27B model, whose scores have another scale, which files do not name."""
    fields = keys.decoder()
    heads = fields["num_attention_heads"]
    scalar = fields["hidden_size"] // heads if fields["num_hidden_layers"] == largest else fields["head_dim"]
    own = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "query_pre_attn_scalar": scalar}
    return {**fields, **own, "sliding_window": keys.size("attention.sliding_window")}


def _gpt2(keys: _Keys) -> Config:
    fields = {field: keys.size(key) for key, field in _GPT2.items()}
    epsilon = keys.number("attention.layer_norm_epsilon")
    return Config(architectures=["GPT2LMHeadModel"], activation_function="gelu_new", layer_norm_epsilon=epsilon, **keys.common, **fields)


_FAMILIES: dict[str, Callable[[_Keys], Config]] = {
    "llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "gemma2": _gemma2, "gemma3": _gemma3, "gpt2": _gpt2,
}  # fmt: skip


def _dtype(found: Contents) -> str:
    """The name of the dtype of the matrices if all have the same plain type, else bfloat16."""
    plain = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    stored = {record.kind.name for record in found.records.values() if len(record.shape) > 1}
    return plain.get(stored.pop(), "bfloat16") if len(stored) == 1 else "bfloat16"
