"""kivi, with 2 and 4 bits, against its definition, written again in float64 with one loop for each group."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from redraft import LLM, SamplingParams
from redraft.card import Guarantee
from redraft.core.sequence import Request
from redraft.errors import InvalidInput, Unsupported
from redraft.kv.quantization import kivi
from redraft.kv.quantization.kivi import KIVI, CodeUnits, Int4
from redraft.ops.format import PAGE, Format
from tests.kv.quantization.compiled import attends_over_codes, attends_with_queries_of_bfloat16, same_in_any_batch

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
RUNNER: Any = SimpleNamespace(spec=SimpleNamespace(head_dim=8), backend=SimpleNamespace(dtype=F64))


def opened(dtype: torch.dtype = F64, head_dim: int = 6, block: int = 128, bits: int = 4) -> CodeUnits:
    return KIVI(bits, block).open(SimpleNamespace(spec=SimpleNamespace(head_dim=head_dim), backend=SimpleNamespace(dtype=dtype)))


def draw(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    """Normal numbers with a different mean and spread in each channel, like keys."""
    generator = torch.Generator().manual_seed(seed)
    mean, spread = torch.randn(2, shape[-1], generator=generator, dtype=F64).mul_(3).unbind()
    return (torch.randn(*shape, generator=generator, dtype=F64) * spread + mean).to(dtype)


def encoded(group: list[float], steps: int) -> tuple[list[int], float, float]:
    """The definition."""
    zero = min(group)
    scale = (max(group) - zero) / steps
    return [round((x - zero) / scale) if scale else 0 for x in group], scale, zero  # round() is half to even


def held(codec: CodeUnits, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Units [K, n, 32, D] in the form that attention reads."""
    return {
        name: array.view(*keys.shape[:2], *array.shape[1:]) for name, array in codec.pack(keys.flatten(0, 1), values.flatten(0, 1)).items()
    }


def dense(codec: CodeUnits, units: dict[str, Tensor], q: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and outputs over the decoded cache, in float64, with one loop for each head."""
    keys, values = (x.double().flatten(1, 2) for x in codec.decode(units))
    each = range(len(q))
    return torch.stack([q[h].double() @ keys[h].T for h in each]), torch.stack([weights[h].double() @ values[h] for h in each])


def packed(row: list[int], bits: int) -> list[int]:
    """The bytes of one row: with 4 bits channel i low, channel i + D / 2 high."""
    size = len(row) * bits // 8
    return [sum(row[i + part * size] << part * bits for part in range(8 // bits)) for i in range(size)]


def agrees_with_the_definition(codec: CodeUnits, seed: int = 0) -> None:
    size, bits, steps = codec.arrays["key_scales"].shape[0], codec.bits, 2**codec.bits - 1
    keys, values = draw(seed, 2, 3, PAGE, size), draw(seed + 1, 2, 3, PAGE, size)
    units = held(codec, keys, values)
    back_keys, back_values = codec.decode(units)
    for at in np.ndindex(2, 3):
        channels = [encoded(keys[at][:, c].tolist(), steps) for c in range(size)]
        assert units["key_scales"][at].tolist() == [scale for _, scale, _ in channels]
        assert units["key_zeros"][at].tolist() == [zero for _, _, zero in channels]
        for t in range(PAGE):
            assert units["keys"][at][t].tolist() == packed([codes[t] for codes, _, _ in channels], bits)
            assert back_keys[at][t].tolist() == [codes[t] * scale + zero for codes, scale, zero in channels]
            codes, scale, zero = encoded(values[at][t].tolist(), steps)
            assert units["values"][at][t].tolist() == packed(codes, bits)
            assert (units["value_scales"][at][t].item(), units["value_zeros"][at][t].item()) == (scale, zero)
            assert back_values[at][t].tolist() == [code * scale + zero for code in codes]
    q, weights = draw(seed + 2, 2, 5, size), draw(seed + 3, 2, 5, 3 * PAGE)
    scores, out = dense(codec, units, q, weights)
    torch.testing.assert_close(codec.scores(units, q), scores, rtol=1e-12, atol=1e-12 * float(scores.abs().max()))
    torch.testing.assert_close(codec.mix(units, weights), out, rtol=1e-12, atol=1e-12 * float(out.abs().max()))


@given(st.integers(0, 2**32))
@settings(max_examples=5, deadline=None)
def test_definition(seed: int) -> None:
    agrees_with_the_definition(opened(), seed)
    agrees_with_the_definition(opened(head_dim=8, bits=2), seed)


encode = CodeUnits._encode


def keys_by_token(self: CodeUnits, x: Tensor, along: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, zeros = encode(self, x, -1)
    return (codes, scales, zeros) if along == -1 else (codes, scales[..., : x.shape[-1]], zeros[..., : x.shape[-1]])


def one_grid(self: CodeUnits, x: Tensor, along: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.aminmax()
    _, scales, zeros = encode(self, x, along)
    shared = ((x - low) / ((high - low) / 15)).round().to(torch.uint8).chunk(2, -1)
    return shared[0] | shared[1] << 4, ((high - low) / 15).expand(scales.shape), low.expand(zeros.shape)


def symmetric(self: CodeUnits, x: Tensor, along: int) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, _ = encode(self, x, along)
    return codes, scales, -7.5 * scales


def other_order(self: CodeUnits, packed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat([packed >> 4, packed & 15], -1).to(dtype)


def side_by_side(self: CodeUnits, packed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(dtype)


@pytest.mark.parametrize("fault", [keys_by_token, one_grid, symmetric])
def test_a_wrong_grid_is_caught(fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CodeUnits, "_encode", fault)
    with pytest.raises(AssertionError):
        agrees_with_the_definition(opened())


@pytest.mark.parametrize("fault", [other_order, side_by_side])
def test_a_wrong_order_of_nibbles_is_caught(fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CodeUnits, "_unpack", fault)
    with pytest.raises(AssertionError):
        agrees_with_the_definition(opened())


@pytest.mark.parametrize("verb", ["scores", "mix"])
@pytest.mark.parametrize("part", ["scales", "zeros"])
def test_a_wrong_grid_in_attention_is_caught(verb: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next unit's grid."""
    right, name = getattr(CodeUnits, verb), f"{'key' if verb == 'scores' else 'value'}_{part}"
    monkeypatch.setattr(CodeUnits, verb, lambda self, units, x: right(self, units | {name: units[name].roll(1, 1)}, x))
    with pytest.raises(AssertionError):
        agrees_with_the_definition(opened())


@pytest.mark.parametrize("room", [1, 2 * 5 * 6, 2 * 2 * 5 * 6])
def test_pages_in_runs(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one page, and of two pages with one page left over."""
    monkeypatch.setattr(kivi, "ROOM", room)
    agrees_with_the_definition(opened())


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 2e-6), (BF16, 2**-8)])
def test_attention_over_codes_is_attention_over_the_decoded_cache(dtype: torch.dtype, tolerance: float) -> None:
    codec = opened(dtype, 16)
    units = held(codec, draw(0, 2, 4, PAGE, 16, dtype=dtype), draw(1, 2, 4, PAGE, 16, dtype=dtype))
    assert [x.dtype for x in codec.decode(units)] == [dtype, dtype]
    attends_over_codes(codec, units, dense, draw, tolerance, codec.decode(units)[0].abs().max())


def test_queries_of_bfloat16() -> None:
    codec = opened(BF16, 16)
    units = held(codec, draw(0, 1, 2, PAGE, 16, dtype=BF16), draw(1, 1, 2, PAGE, 16, dtype=BF16))
    attends_with_queries_of_bfloat16(codec, units, dense, draw)


@given(st.integers(0, 2**32), st.sampled_from([F64, F32, BF16]), st.integers(-30, 30))
@settings(max_examples=40, deadline=None)
def test_half_a_scale(seed: int, dtype: torch.dtype, power: int) -> None:
    """An element changes by at most half a scale; a scale is a 15th of the range of its group; least elements are exact."""
    codec = opened(dtype, 16)
    keys, values = draw(seed, 4, PAGE, 16, dtype=dtype) * 10.0**power, draw(seed + 1, 4, PAGE, 16, dtype=dtype) * 10.0**power
    units = codec.pack(keys, values)
    eps = torch.finfo(dtype).eps
    for name, x, along, back in zip(("key", "value"), (keys, values), (-2, -1), codec.decode(units), strict=True):
        scale = units[f"{name}_scales"].double().unsqueeze(along)
        low, high = x.double().aminmax(dim=along, keepdim=True)
        torch.testing.assert_close(scale, (high - low) / 15, rtol=2 * eps, atol=0)
        assert ((back.double() - x.double()).abs() <= scale / 2 * (1 + 1e-4) + eps * torch.maximum(-low, high)).all()
        assert torch.equal(back.amin(along), x.amin(along))


@given(st.floats(-(2.0**120), 2.0**120, width=32), st.sampled_from([F64, F32, BF16]))
@settings(max_examples=50, deadline=None)
def test_groups_of_equal_elements_are_exact(value: float, dtype: torch.dtype) -> None:
    """Keys: each channel constant, next to one that is not; values: each token constant."""
    keys = torch.full((1, PAGE, 4), value).to(dtype)
    keys[..., 1] = torch.arange(PAGE)
    values = torch.full((1, PAGE, 4), value).to(dtype)
    values[:, 3] = torch.arange(4)
    codec = opened(dtype, 4)
    back = codec.decode(codec.pack(keys, values))
    assert torch.equal(back[0][..., [0, 2, 3]], keys[..., [0, 2, 3]])
    others = torch.arange(PAGE) != 3
    assert torch.equal(back[1][:, others], values[:, others])


@pytest.mark.parametrize(("largest", "scale"), [(22, 1), (7, 0)])
def test_ranges_too_small_for_a_scale(largest: int, scale: int) -> None:
    """In multiples of the least float32, the scale is rounded down by a third, or to zero. With zero, all codes are zero."""
    x = torch.arange(PAGE, dtype=F32)[:, None].clamp(max=largest).expand(1, PAGE, PAGE) * 2.0**-149
    codec = opened(F32, PAGE)
    units = codec.pack(x, x.mT)
    least = torch.arange(PAGE).clamp(max=15 * scale) * 2.0**-149
    assert all(torch.equal(units[f"{name}_scales"], torch.full((1, PAGE), scale * 2.0**-149)) for name in ("key", "value"))
    assert torch.equal(codec.decode(units)[0][0, :, 0], least) and torch.equal(codec.decode(units)[1][0, 0], least)
    assert scale or not (units["keys"].any() or units["values"].any())


def test_fresh_pages_decode_to_zeros() -> None:
    codec = opened()
    fresh = {name: torch.zeros(1, 2, *array.shape, dtype=array.dtype) for name, array in codec.arrays.items()}
    assert not any(x.any() for x in codec.decode(fresh))
    assert not codec.scores(fresh, torch.ones(1, 3, 6)).any() and not codec.mix(fresh, torch.ones(1, 3, 2 * PAGE)).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_takes_its_group_and_no_other(bad: float) -> None:
    codec = opened(F32)
    keys, values = draw(0, 2, PAGE, 6, dtype=F32), draw(1, 2, PAGE, 6, dtype=F32)
    good = codec.decode(codec.pack(keys, values))
    keys[1, 5, 3] = values[1, 7, 2] = bad
    back = codec.decode(codec.pack(keys, values))
    hit = torch.zeros(2, 2, PAGE, 6, dtype=torch.bool)
    hit[0, 1, :, 3] = hit[1, 1, 7] = True
    for i in range(2):
        assert back[i][hit[i]].isnan().all()
        assert torch.equal(back[i][~hit[i]], good[i][~hit[i]])


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_codes_depend_on_their_unit_alone(dtype: torch.dtype) -> None:
    codec = opened(dtype)
    keys, values = draw(0, 5, PAGE, 6, dtype=dtype), draw(1, 5, PAGE, 6, dtype=dtype)
    together = codec.pack(keys, values)
    alone = [codec.pack(keys[i : i + 1], values[i : i + 1]) for i in range(5)]
    for name, array in together.items():
        assert torch.equal(torch.cat([one[name] for one in alone]), array)


@pytest.mark.parametrize(("dtype", "bits", "taken", "full"), [(F32, 4, 88, 512), (BF16, 4, 76, 256), (F32, 2, 56, 512), (BF16, 2, 44, 256)])
def test_bytes(dtype: torch.dtype, bits: int, taken: int, full: int) -> None:
    """Bytes of a token and head at D = 64. The arrays are those of pack()."""
    codec = opened(dtype, 64, bits=bits)
    assert Format(codec.name, codec.arrays, codec).bytes == PAGE * taken
    assert 2 * 64 * dtype.itemsize == full and taken == 64 * bits / 4 + (2 * 64 + 64) * dtype.itemsize / 32
    made = codec.pack(draw(0, 3, PAGE, 64, dtype=dtype), draw(1, 3, PAGE, 64, dtype=dtype))
    assert list(made) == list(codec.arrays)
    for name, array in codec.arrays.items():
        assert made[name].shape == (3, *array.shape) and made[name].dtype == array.dtype


def test_what_is_refused() -> None:
    for block in (0, -32, 16, 100):
        with pytest.raises(InvalidInput, match=f"int4:block={block}: must be a multiple of 32"):
            Int4(block)
    with pytest.raises(InvalidInput, match="kivi:bits=3: must be 2 or 4"):
        KIVI(bits=3)
    for size, bits in ((7, 4), (6, 2)):
        with pytest.raises(Unsupported, match=f"do not divide the head size {size}"):
            opened(head_dim=size, bits=bits)
    with pytest.raises(Unsupported, match="whole pages"):
        opened().store(torch.zeros(1, 6), torch.zeros(1, 6))


@pytest.mark.parametrize("keep", [None, "snapkv:budget=0.5,window=4,pool=3,sinks=1", "ada-kv:budget=0.5,window=4,pool=3,sinks=1"])
def test_a_text_is_the_same_in_any_batch(keep: str | None) -> None:
    same_in_any_batch("kivi:block=32", keep=keep)


def test_pages_are_encoded_after_a_policy_evicted() -> None:
    """100 tokens are given and half of them stay. No page is encoded before that; later, a block ends at 128 tokens."""
    llm, prompt = LLM("embedded", draft="none", dtype="float32", token_budget=32), [*range(5, 105)]
    keep = "snapkv:budget=0.5,window=4,pool=3,sinks=1"
    llm.engine.add(Request("r", prompt, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, keep=keep, codec="kivi:block=64")))
    llm.engine.step()
    (seq,) = llm.engine.running
    table, found = llm.engine.memory.paged.table, set()
    while llm.engine.running:
        (lane, *_) = table._held[seq.id].lanes
        found.add((seq.stored, len(lane.encoded), lane.length))
        llm.engine.step()
    assert {(64, 0, 64), (101, 0, 51), (127, 0, 77), (128, 2, 78), (138, 2, 88)} <= found


@pytest.mark.parametrize(
    ("keep", "why"),
    [
        ("h2o:budget=0.5", "evicts more than once, and a keep policy cannot evict from encoded pages"),
        ("kvmerger", "writes slots that it keeps"),
    ],
)
def test_what_it_does_not_combine_with(keep: str, why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        LLM("embedded", draft="none").engine.policies.check(SamplingParams(keep=keep, codec="kivi"))


def test_claim() -> None:
    assert Int4.card.guarantee == KIVI.card.guarantee == Guarantee.LOSSY
    assert [(one.open(RUNNER).name, one.open(RUNNER).block) for one in (Int4(32), KIVI(4), KIVI(2, 64))] == [
        ("int4", 32),
        ("int4", 128),
        ("int2", 64),
    ]
