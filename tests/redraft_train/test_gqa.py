"""Fewer kv heads: one head a group is the identity, heads that span one lose nothing, and what is lost is what was said to be dropped."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from redraft import LLM, SamplingParams
from redraft.errors import InvalidInput, Unsupported
from redraft_train import gqa
from redraft_train.gqa import Heads, Maps, compress
from tests.checkpoints import tiny_llama

HIDDEN, SIZE, HEADS, KV_HEADS = 24, 6, 4, 2
TEXTS = [[(7 * i + j * j) % 50 for i in range(40)] for j in range(12)]


def model(**changes: Any) -> Any:
    torch.manual_seed(0)
    fields = {"vocab_size": 50, "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    fields |= {"num_key_value_heads": KV_HEADS, "head_dim": SIZE, "max_position_embeddings": 64, "attention_bias": True, **changes}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval().requires_grad_(False).double()
    for parameter in made.parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.rand(parameter.shape) + 0.5)
        else:
            parameter.mul_(10)
    return made


def logits(made: Any) -> torch.Tensor:
    return torch.stack([made(torch.tensor([ids])).logits[0] for ids in TEXTS])


def span(own: Any) -> None:
    """Makes both kv heads functions of the first: its keys times a factor for each pair, its values times a matrix."""
    torch.manual_seed(1)
    factor, matrix = torch.polar(torch.rand(SIZE // 2) + 0.5, 6 * torch.rand(SIZE // 2)), torch.randn(SIZE, SIZE).double()
    for module, made in (
        (own.k_proj, lambda z: gqa.rows_of(factor[None, :, None] * gqa.pairs(z, SIZE))),
        (own.v_proj, lambda z: matrix @ z),
    ):
        rows = gqa.joined(module.weight, module.bias)
        rows = torch.cat([rows[:SIZE], made(rows[:SIZE])])
        module.weight.copy_(rows[:, :-1])
        module.bias.copy_(rows[:, -1])


def test_one_head_a_group_changes_nothing() -> None:
    own, other = model(), model()
    compress(other, TEXTS, KV_HEADS)
    assert all(torch.equal(one, other.state_dict()[name]) for name, one in own.state_dict().items())


def test_heads_that_span_one_lose_nothing() -> None:
    own = model()
    for layer in own.model.layers:
        span(layer.self_attn)
    expected, pooled = logits(own), copy.deepcopy(own)
    compress(own, TEXTS, 1)
    assert own.model.layers[0].self_attn.k_proj.weight.shape == (SIZE, HIDDEN)
    assert own.model.layers[1].self_attn.v_proj.bias.shape == (SIZE,)
    torch.testing.assert_close(logits(own), expected, rtol=1e-4, atol=1e-4)
    compress(pooled, TEXTS, 1, "mean")
    assert (logits(pooled) - expected).abs().max() > 0.1


def test_four_kv_heads_become_two_of_neighbours() -> None:
    own = model(num_key_value_heads=4)
    for layer in own.model.layers:
        for module in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            for rows in (module.weight, module.bias):
                rows.copy_(rows[[*range(SIZE), *range(SIZE), *range(2 * SIZE, 3 * SIZE), *range(2 * SIZE, 3 * SIZE)]])
    expected, pooled = logits(own), copy.deepcopy(own)
    for other, pool in ((own, "svd"), (pooled, "mean")):
        compress(other, TEXTS, 2, pool)
        torch.testing.assert_close(logits(other), expected, rtol=1e-4, atol=1e-4)


def test_the_error_is_the_energy_of_what_is_dropped() -> None:
    torch.manual_seed(2)
    values = torch.randn(500, 2 * SIZE).double()
    keys = torch.randn(500, 3, 2).double() @ torch.randn(2, 2).double() + 0.5j * torch.randn(500, 3, 2).double()
    second, moments = values.T @ values, torch.einsum("naj,nbj->jab", keys, keys.conj())
    maps = Maps.svd(second, torch.stack([torch.eye(2, dtype=torch.complex128)] * (SIZE // 2)))
    again = torch.cat([maps.back[i] @ maps.values for i in range(2)])
    dropped = torch.linalg.eigvalsh(second)[:-SIZE].sum()
    assert torch.allclose((values - values @ again.T).square().sum(), dropped)
    assert torch.allclose(maps.values @ maps.values.T, torch.eye(SIZE).double())
    found = Maps.svd(torch.eye(12, dtype=torch.float64), moments)
    for j in range(2):
        made = keys[:, :, j] @ found.keys[j][:, None] * found.turned[j]
        assert torch.allclose((keys[:, :, j] - made).abs().square().sum(), torch.linalg.eigvalsh(moments[j])[:-1].sum())


def test_svd_keeps_more_than_the_mean() -> None:
    """Errors of the outputs of attention, whose weights follow from the keys."""
    own = model()
    expected, lost = logits(own), {}
    for pool in gqa.POOLS:
        other = copy.deepcopy(own)
        compress(other, TEXTS, 1, pool)
        lost[pool] = float((logits(other) - expected).square().mean())
    assert 0 < lost["svd"] < 0.8 * lost["mean"]


def test_biases_are_part_of_what_is_kept() -> None:
    own = model()
    x = torch.cat([torch.randn(300, HIDDEN).double(), torch.ones(300, 1).double()], 1)
    layer = own.model.layers[0].self_attn
    heads = Heads(*(gqa.joined(one.weight, one.bias) for one in (layer.q_proj, layer.k_proj, layer.v_proj)), layer.o_proj.weight, SIZE)
    (maps,) = heads.maps(x.T @ x / len(x), 1, "svd")
    values = x @ heads.v.T
    directions = torch.linalg.svd(values, full_matrices=False).Vh[:SIZE]
    torch.testing.assert_close(maps.values.T @ maps.values, directions.T @ directions)


def test_the_checkpoint_is_written_and_read_by_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_llama(tmp_path / "source", family="llama2")
    text = tmp_path / "text.txt"
    text.write_text("Some words that stand here to be read. " * 40)
    monkeypatch.setattr(sys, "argv", ["gqa", str(source), "--kv-heads", "1", "--out", str(tmp_path / "out"), "--texts", str(text)])
    gqa.main()
    assert capsys.readouterr().out.endswith("1 kv heads\n")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == 1
    llm = LLM(str(tmp_path / "out"), dtype="float32", max_seqs=2, cache_memory=1 << 22)
    assert llm.runner.spec.kv_heads == 1
    output = llm.generate("Some", SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))[0]
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([llm.tokenizer.encode("Some")])
    assert (
        output.outputs[0].token_ids == made.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, ids.shape[1] :].tolist()
    )


def test_what_cannot_be_joined_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="kv-heads = 3: must divide the model's 2"):
        compress(model(), TEXTS, 3)
    with pytest.raises(Unsupported, match="model_type = 'qwen3'"):
        gqa.check(transformers.Qwen3Config(), 1)
    with pytest.raises(InvalidInput, match="too short"):
        compress(model(), [], 1)
