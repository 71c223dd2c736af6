"""The names of tensors in GGUF files, and how their rows lie there."""

from __future__ import annotations

from redraft.core.spec import Experts, ModelSpec, WeightSource

EMBEDDING, HEAD, ROPE = "token_embd.weight", "output.weight", "rope_freqs.weight"
TOP = {
    "embed": EMBEDDING, "head": HEAD, "positions": "position_embd.weight",
    "final_norm.weight": "output_norm.weight", "final_norm.bias": "output_norm.bias",
}  # fmt: skip
PARTS = {
    "attn_norm": ("attn_norm",), "qkv": ("attn_q", "attn_k", "attn_v"), "out": ("attn_output",),
    "q_norm": ("attn_q_norm",), "k_norm": ("attn_k_norm",),
    "attn_post_norm": ("post_attention_norm",), "mlp_post_norm": ("post_ffw_norm",),
    "mlp_norm": ("ffn_norm",), "up": ("ffn_gate", "ffn_up"), "down": ("ffn_down",), "router": ("ffn_gate_inp",),
}  # fmt: skip
_OTHERS = {"gpt2": {"qkv": ("attn_qkv",), "up": ("ffn_up",)}}
PAIRED = ("llama", "mistral", "mixtral")  # families whose queries and keys are stored with the halves of a head interleaved


def source(spec: ModelSpec, name: str) -> WeightSource:
    """Where a GGUF file stores a canonical weight."""
    if name in TOP:
        return WeightSource((TOP[name],))
    _, layer, *expert, part, kind = name.split(".")
    places = _OTHERS.get(spec.family, {}).get(part, PARTS[part])
    if expert:
        mlp = spec.layers[int(layer)].mlp
        assert isinstance(mlp, Experts)
        single = WeightSource(tuple(f"blk.{layer}.{one}.{expert[1]}.{kind}" for one in places))  # files until April 2024
        names = tuple(f"blk.{layer}.{one}_exps.{kind}" for one in places)
        return WeightSource(names, place=(int(expert[1]), mlp.count), otherwise=single)
    names = tuple(f"blk.{layer}.{one}.{kind}" for one in places)
    if part != "qkv" or len(names) == 1:
        return WeightSource(names)
    mixer = spec.attention[int(layer)]
    heads = (mixer.heads, mixer.kv_heads, mixer.kv_heads)
    paired = (mixer.heads, mixer.kv_heads, 0) if spec.family in PAIRED else ()
    return WeightSource(names, tuple(count * mixer.head_dim for count in heads), paired=paired)
