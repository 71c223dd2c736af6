"""The specs that each family's file makes from a config: fields, names of weights, rope, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from redraft import registry
from redraft.core.spec import Experts, Mlp, ModelSpec
from redraft.errors import CheckpointError, Unsupported
from redraft.models import rotary
from redraft.models.config import Config, Family, filled
from tests.models import tiny


def config(name: str, **changes: Any) -> Any:
    return tiny.config_class(name)(**{**tiny.FAMILIES[name][1], **changes})


def family(name: str) -> Family:
    found: Family = registry.load(registry.FAMILIES[tiny.architecture(name)])
    return found


def spec(name: str, **changes: Any) -> ModelSpec:
    return family(name).spec(config(name, **changes))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_missing_fields_have_the_defaults_of_transformers(name: str) -> None:
    own = family(name)
    fields = tiny.FAMILIES[name][1]
    assert own.spec(filled(Config(**fields), own.defaults)) == spec(name)
    whole = tiny.config_class(name)()
    assert own.spec(filled(Config(), own.defaults)) == own.spec(whole) and own.eos == whole.eos_token_id and own.name == whole.model_type


@pytest.mark.parametrize(
    ("name", "field", "value", "allowed"),
    [
        ("llama2", "vocab_size", "61", "an integer from 1"),
        ("llama2", "vocab_size", None, "an integer from 1"),
        ("llama2", "head_dim", 0.5, "an integer from 1"),
        ("llama2", "num_hidden_layers", True, "an integer from 1"),
        ("llama2", "num_hidden_layers", 10**6, "an integer from 1 to 10000"),
        ("mistral", "sliding_window", 0, "an integer from 1"),
        ("phi3", "sliding_window", 2**32 + 3, "an integer from 1 to 2147483647"),
        ("gpt2", "n_positions", -1, "an integer from 1"),
        ("llama2", "rms_norm_eps", "1e-5", "a number from 0 to 1"),
        ("llama2", "rms_norm_eps", float("inf"), "a number from 0 to 1"),
        ("llama2", "rms_norm_eps", None, "a number from 0 to 1"),
        ("llama2", "hidden_act", 3, "a text"),
        ("llama2", "tie_word_embeddings", 1, "true or false"),
        ("llama2", "rope_theta", -1.0, "a positive number"),
        ("llama2", "rope_parameters", [1], "an object"),
        ("llama2", "rope_scaling", {"type": "linear", "factor": float("nan")}, "a positive number"),
        ("mixtral", "num_experts_per_tok", 6, "1 to 5, the number of experts"),
        ("qwen3-moe", "mlp_only_layers", ["0"], "a list of integers"),
        ("qwen2", "layer_types", ["full_attention"], "a list of 3 texts"),
        ("stablelm", "partial_rotary_factor", 0.1, "an even number"),
    ],
)
def test_values_that_no_family_allows(name: str, field: str, value: Any, allowed: str) -> None:
    own = family(name)
    with pytest.raises(CheckpointError, match=f"{'factor' if field == 'rope_scaling' else field} = .*{allowed}"):
        own.spec(filled(Config(**{**tiny.FAMILIES[name][1], field: value}), own.defaults))


def test_a_field_may_have_the_name_of_anything() -> None:
    assert filled(Config(over=1, items=2), {"over": 3}).over == 1


def test_rope_scaling_comes_before_rope_parameters() -> None:
    """As in transformers 5.23, which takes the base from the top or the family's default then."""
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert rotary.rotary(Old(**both, rope_theta=100.0), 4).frequencies == pytest.approx((0.5, 0.05))  # type: ignore[arg-type]


def test_llama() -> None:
    model = spec("llama-biases")
    layer, mixer = model.layers[0], model.attention[0]
    assert (model.vocab, model.hidden, model.context, len(model.layers), model.tied) == (tiny.V, 24, tiny.CONTEXT, 3, False)
    assert (mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.window, mixer.qk_norm) == (4, 2, 10, None, None)
    assert mixer.qkv_bias and mixer.out_bias and layer.mlp == Mlp(40, "silu", gated=True, bias=True)
    assert model.source("layers.2.qkv.bias").names == tuple(f"model.layers.2.self_attn.{p}_proj.bias" for p in "qkv")
    assert model.source("layers.2.qkv.bias").rows == (40, 20, 20)
    assert model.source("layers.0.up.weight").names == ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    assert not spec("llama2").attention[0].qkv_bias


def test_windows() -> None:
    assert [mixer.window for mixer in spec("mistral").attention] == [11] * 3
    assert [mixer.window for mixer in spec("mistral-full").attention] == [None] * 3
    assert [mixer.window for mixer in spec("qwen2").attention] == [None] * 3
    assert [mixer.window for mixer in spec("qwen2-window").attention] == [None, None, 9]
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert [mixer.window for mixer in spec("qwen2-window", layer_types=kinds).attention] == [9, None, 9]


def test_qwen() -> None:
    assert spec("qwen2").attention[0].qkv_bias and not spec("qwen2").attention[0].out_bias
    assert spec("qwen3").tied and spec("qwen3").attention[0].qk_norm is not None and spec("qwen3").attention[0].head_dim == 12
    assert "layers.0.q_norm.weight" in spec("qwen3").shapes()


def test_mixtral() -> None:
    model = spec("mixtral")
    assert model.layers[0].mlp == Experts(5, 2, Mlp(40, "silu", gated=True), renormalise=True)
    up = model.source("layers.1.experts.4.up.weight")
    assert up.names == tuple(f"model.layers.1.block_sparse_moe.experts.4.{p}.weight" for p in ("w1", "w3"))
    assert up.otherwise is not None and up.otherwise.place == (4, 5)


def test_gpt_oss() -> None:
    model = spec("gpt-oss")
    layer, mixer = model.layers[0], model.attention[0]
    mlp = Mlp(40, "quick_gelu", gated=True, bias=True, limit=0.6, shift=1.0)
    assert layer.mlp == Experts(5, 2, mlp, renormalise=True, router_bias=True)
    assert mixer.sink_logits and mixer.qkv_bias and mixer.out_bias
    assert [one.window for one in model.attention] == [9, None, 9]
    assert mixer.rotary is not None and mixer.rotary.scale > 1 and model.context == 32 * 4096
    up = model.source("layers.2.experts.3.up.weight")
    assert up.names == ("model.layers.2.mlp.experts.gate_up_proj",) and up.place == (3, 5) and up.transposed
    assert up.order == (*range(0, 80, 2), *range(1, 80, 2)) == model.source("layers.2.experts.3.up.bias").order
    assert model.shapes()["layers.1.sink_logits"] == (4,) and model.shapes()["layers.1.router.bias"] == (5,)
    assert [one.window for one in spec("gpt-oss", layer_types=["full_attention"] * 3, sliding_window=None).attention] == [None] * 3


def test_stablelm_with_heads_apart() -> None:
    model = spec("stablelm-parallel")
    assert model.layers[0].parallel and model.source("layers.1.mlp_norm.weight").names == ("model.layers.1.input_layernorm.weight",)
    assert model.attention[0].norm_heads_apart and model.shapes()["layers.0.k_norm.weight"] == (32,)
    assert "layers.0.k_norm.bias" not in model.shapes()
    gains = model.source("layers.2.k_norm.weight")
    assert gains.names == tuple(f"model.layers.2.self_attn.k_layernorm.norms.{head}.weight" for head in (0, 1))
    assert gains.order[:16] == (0, 1, *range(4, 10), 2, 3, *range(10, 16))


def test_gpt2() -> None:
    model = spec("gpt2")
    layer, mixer = model.layers[0], model.attention[0]
    assert model.tied and model.learned_positions == tiny.CONTEXT and mixer.rotary is None
    assert (layer.norm.kind, mixer.qkv_bias, mixer.out_bias) == ("layer", True, True)
    assert layer.mlp == Mlp(96, "gelu_tanh", gated=False, bias=True)
    place = model.source("layers.1.qkv.weight")
    assert place.transposed and place.names == ("transformer.h.1.attn.c_attn.weight",) and model.prefix == "transformer."
    assert not model.source("layers.1.qkv.bias").transposed


@pytest.mark.torch
@pytest.mark.parametrize(
    ("theta", "context", "rope"),
    [
        (10_000.0, 4096, {"rope_type": "linear", "factor": 4.0}),
        (5e5, 131072, {**tiny.LLAMA3, "original_max_position_embeddings": 8192}),  # Llama 3.1 8B
        (5e5, 131072, {**tiny.LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}),  # Llama 3.2 1B
        (1e6, 32768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),  # Qwen2.5
        (1e4, 4096, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048, "attention_factor": 0.7}),
        (1e4, 4096, {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "mscale": 0.8, "mscale_all_dim": 0.5}),
        (1e4, 4096, {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": 20, "truncate": False}),
    ],
)
def test_rope_equals_transformers(theta: float, context: int, rope: dict[str, Any]) -> None:
    made = config("llama2", head_dim=64, max_position_embeddings=context, rope_parameters={**rope, "rope_theta": theta})
    want, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](made, None)
    got = rotary.rotary(made, 64)
    assert got.frequencies == pytest.approx(want.tolist(), rel=1e-5)
    assert got.scale == pytest.approx(scale, rel=1e-9)
    assert got.frequencies != rotary.rotary(config("llama2", rope_parameters={"rope_type": "default", "rope_theta": theta}), 64).frequencies


@pytest.mark.parametrize(
    ("given", "rope", "context"),
    [
        (4096, {"rope_type": "default"}, 4096),
        (4096, {"rope_type": "linear", "factor": 4.0}, 16384),
        (32768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),  # Qwen2.5
        (40960, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),  # Qwen3
        (163840, {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}, 163840),  # already scaled
        (131072, {**tiny.LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}, 131072),  # Llama 3.2 1B
        (8192, {**tiny.LLAMA3, "original_max_position_embeddings": 8192}, 65536),
    ],
)
def test_the_context_is_scaled_as_the_frequencies_are(given: int, rope: dict[str, Any], context: int) -> None:
    assert spec("llama2", max_position_embeddings=given, rope_parameters={**rope, "rope_theta": 1e4}).context == context


class Old:
    """A config in the form of transformers 4."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(max_position_embeddings=64, **fields)


def test_rope_of_older_configs() -> None:
    assert rotary.rotary(Old(rope_theta=100.0, rope_scaling=None), 4).frequencies == pytest.approx((1.0, 0.1))  # type: ignore[arg-type]
    old = Old(rope_theta=100.0, rope_scaling={"type": "linear", "factor": 2.0})
    assert rotary.rotary(old, 4).frequencies == pytest.approx((0.5, 0.05))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="'linear' lacks 'factor'"):
        rotary.rotary(Old(rope_theta=100.0, rope_scaling={"type": "linear"}), 4)  # type: ignore[arg-type]


def test_zeros_of_yarn_switch_a_field_off() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 24}
    zeros = {"mscale": 0.0, "mscale_all_dim": 0.0, "beta_fast": 0}
    plain, zeroed = (rotary.rotary(Old(rope_parameters=one), 8) for one in (yarn, yarn | zeros))  # type: ignore[arg-type]
    assert plain == zeroed


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "spiral", "factor": 2.0}, "'spiral'"),
        ({"rope_type": "default", "spiral": 3}, "'spiral'"),
    ],
)
def test_rope_refusals(rope: dict[str, Any], named: str) -> None:
    with pytest.raises(Unsupported, match=named):
        rotary.rotary(Old(rope_parameters={**rope, "rope_theta": 1e4}), 8)  # type: ignore[arg-type]


def rope(**fields: Any) -> Any:
    return Old(rope_parameters={"rope_theta": 1e4, **fields})


@pytest.mark.parametrize("factors", [None, [1.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, True]])
def test_longrope_needs_a_factor_for_each_pair(factors: Any) -> None:
    wanted = "short_factor = .*4 positive numbers"
    with pytest.raises(CheckpointError, match=wanted):
        rotary.rotary(rope(rope_type="longrope", long_factor=[2.0] * 4, short_factor=factors), 8)


@pytest.mark.torch
def test_scalings_that_depend_on_the_longest_text() -> None:
    """The whole engine has one: `max_model_len`, else the context."""
    config = rope(rope_type="longrope", long_factor=[2.0, 4.0], short_factor=[1.0, 1.0], original_max_position_embeddings=50)
    far, config.max_model_len = rotary.rotary(config, 4), 50
    near = rotary.rotary(config, 4)
    assert near.frequencies == pytest.approx((1.0, 0.01)) and far.frequencies == pytest.approx((0.5, 0.0025))
    assert near.scale == far.scale == pytest.approx((1 + math.log(config.max_position_embeddings / 50) / math.log(50)) ** 0.5)
    config = rope(rope_type="dynamic", factor=2.0)
    longer, config.max_model_len = rotary.rotary(config, 8), 10
    plain = rotary.rotary(config, 8)
    assert plain.frequencies == pytest.approx(rotary.rotary(rope(rope_type="default"), 8).frequencies)
    length = 2 * config.max_position_embeddings
    theirs = transformers.LlamaConfig(head_dim=8, max_position_embeddings=64, rope_parameters=config.rope_parameters)
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, None, seq_len=length)
    assert rotary.context(config) == length and longer.frequencies == pytest.approx(expected.tolist())


def test_a_part_of_a_head_with_a_scaling() -> None:
    """The scale does not reach what is not rotated."""
    yarn = rotary.rotary(rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=24, partial_rotary_factor=0.5), 8)
    assert yarn.frequencies[2:] == (0.0, 0.0) and yarn.scales == (yarn.scale, yarn.scale, 1.0, 1.0) and yarn.scale > 1


@pytest.mark.parametrize(
    ("name", "changes", "error", "named"),
    [
        ("gemma3", {"attn_logit_softcapping": 50.0}, Unsupported, "attn_logit_softcapping = 50.0"),
        ("gemma2", {"use_bidirectional_attention": True}, Unsupported, "use_bidirectional_attention"),
        ("granite", {"logits_scaling": 0.0}, CheckpointError, "logits_scaling = 0.0: must be a positive number"),
        ("cohere", {"logit_scale": -1.0}, CheckpointError, "logit_scale = -1.0: must be a positive number"),
        ("cohere", {"use_qk_norm": True}, Unsupported, "use_qk_norm"),
        ("falcon", {"alibi": True}, Unsupported, "alibi"),
        ("opt", {"do_layer_norm_before": False}, Unsupported, "do_layer_norm_before"),
        ("opt", {"word_embed_proj_dim": 12}, Unsupported, "word_embed_proj_dim"),
        ("llama2", {"hidden_act": "mish"}, Unsupported, "activation 'mish'"),
        ("llama2", {"attn_logit_softcapping": 50.0}, Unsupported, "attn_logit_softcapping = 50.0"),
        ("llama2", {"final_logit_softcapping": 30.0}, Unsupported, "final_logit_softcapping"),
        ("llama2", {"num_key_value_heads": 3}, CheckpointError, "num_key_value_heads = 3"),
        ("mistral", {"layer_types": ["sliding_attention"] * 3}, Unsupported, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, Unsupported, "chunked_attention"),
        ("llama-biases", {"partial_rotary_factor": 0.4}, Unsupported, "partial_rotary_factor = 0.4: llama models rotate whole heads"),
        ("gpt-oss", {"swiglu_alpha": 1.5}, Unsupported, "swiglu_alpha = 1.5: only 1.702"),
        ("gpt-oss", {"hidden_act": "gelu"}, Unsupported, "hidden_act = 'gelu': only silu"),
        ("gpt-oss", {"swiglu_limit": 0.0}, CheckpointError, "swiglu_limit = 0.0: must be a positive number"),
        ("gpt-oss", {"sliding_window": None}, CheckpointError, "sliding_window = None"),
        ("gpt-oss", {"num_experts_per_tok": 6}, CheckpointError, "num_experts_per_tok = 6: must be 1 to 5"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, Unsupported, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, Unsupported, "scale_attn_weights"),
        ("gpt2", {"add_cross_attention": True}, Unsupported, "add_cross_attention"),
    ],
)
def test_fields_that_would_change_the_network(name: str, changes: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        spec(name, **changes)
