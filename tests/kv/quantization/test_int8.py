"""int8 against its definition, written again in float64 with one loop for each vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from redraft.card import Guarantee
from redraft.kv.quantization import int8
from redraft.kv.quantization.int8 import Int8, Int8Units
from redraft.ops.format import PAGE, Format
from tests.kv.quantization.compiled import attends_over_codes, attends_with_queries_of_bfloat16

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def opened(dtype: torch.dtype = F64, head_dim: int = 8) -> Int8Units:
    return Int8().open(SimpleNamespace(spec=SimpleNamespace(head_dim=head_dim), backend=SimpleNamespace(dtype=dtype)))


def draw(seed: int, *shape: int, dtype: torch.dtype = F64, spread: float = 1.0) -> Tensor:
    """Normal numbers; the magnitudes of vectors differ by up to 10 ** spread."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=F64)
    return (x * 10 ** (spread * torch.rand(*shape[:-1], 1, generator=generator, dtype=F64))).to(dtype)


def encoded(vector: list[float]) -> tuple[list[int], float]:
    """The definition."""
    scale = float(np.float32(max(map(abs, vector)) / 127))
    return [round(x / scale) if scale else 0 for x in vector], scale  # round() is half to even


def held(codec: Int8Units, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Units [K, n, 32, D] in the form that attention reads."""
    return {
        name: array.view(*keys.shape[:2], *array.shape[1:]) for name, array in codec.pack(keys.flatten(0, 1), values.flatten(0, 1)).items()
    }


def dense(codec: Int8Units, units: dict[str, Tensor], q: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and outputs over the decoded cache, in float64, with one loop for each head."""
    keys, values = (x.double().flatten(1, 2) for x in codec.decode(units))
    each = range(len(q))
    return torch.stack([q[h].double() @ keys[h].T for h in each]), torch.stack([weights[h].double() @ values[h] for h in each])


def agrees_with_the_definition(codec: Int8Units, seed: int = 0) -> None:
    keys, values = draw(seed, 2, 3, PAGE, 8), draw(seed + 1, 2, 3, PAGE, 8)
    units = held(codec, keys, values)
    for name, x, back in zip(("key", "value"), (keys, values), codec.decode(units), strict=True):
        for at in np.ndindex(*x.shape[:3]):
            codes, scale = encoded(x[at].tolist())
            assert units[f"{name}s"][at].tolist() == codes
            assert units[f"{name}_scales"][at].item() == scale
            assert back[at].tolist() == [code * scale for code in codes]
    q, weights = draw(seed + 2, 2, 5, 8), draw(seed + 3, 2, 5, 3 * PAGE)
    scores, out = dense(codec, units, q, weights)
    torch.testing.assert_close(codec.scores(units, q), scores, rtol=1e-12, atol=1e-12 * float(scores.abs().max()))
    torch.testing.assert_close(codec.mix(units, weights), out, rtol=1e-12, atol=1e-12 * float(out.abs().max()))


@given(st.integers(0, 2**32))
@settings(max_examples=5, deadline=None)
def test_definition(seed: int) -> None:
    agrees_with_the_definition(opened(), seed)


def by_channel(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = encode(x.mT)
    return codes.mT, scales[..., :1].expand(x.shape[:-1])


def one_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax() / 127).float()
    return (x / scale).round().to(torch.int8), scale.expand(x.shape[:-1])


def cut_off(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = (x.abs().amax(-1) / 127).float()
    return (x / scales[..., None]).to(torch.int8), scales


def half_up(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = (x.abs().amax(-1) / 127).float()
    return (x / scales[..., None] + 0.5).floor().clamp(-127, 127).to(torch.int8), scales


encode = int8._encode


@pytest.mark.parametrize("fault", [by_channel, one_scale, cut_off])
def test_a_wrong_grid_is_caught(fault: Callable[[Tensor], tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "_encode", fault)
    with pytest.raises(AssertionError):
        agrees_with_the_definition(opened())


@pytest.mark.parametrize("verb", ["scores", "mix"])
@pytest.mark.parametrize("scales", [("key_scales", "value_scales"), ("value_scales", "key_scales")])
def test_wrong_scales_in_attention_are_caught(verb: str, scales: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other's scales, or the last token's for all."""
    right = getattr(Int8Units, verb)

    def wrong(self: Int8Units, units: dict[str, Tensor], x: Tensor) -> Any:
        one, other = scales
        swapped = units | ({one: units[other], other: units[one]} if one < other else {name: units[name].roll(1, -1) for name in scales})
        return right(self, swapped, x)

    monkeypatch.setattr(Int8Units, verb, wrong)
    with pytest.raises(AssertionError):
        agrees_with_the_definition(opened())


def ties_go_to_even() -> None:
    vector = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], dtype=F64)
    assert opened().store(vector, vector)["keys"].tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_ties_go_to_even(monkeypatch: pytest.MonkeyPatch) -> None:
    ties_go_to_even()
    monkeypatch.setattr(int8, "_encode", half_up)
    with pytest.raises(AssertionError):
        ties_go_to_even()


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 2e-6), (BF16, 2**-8)])
def test_attention_over_codes_is_attention_over_the_decoded_cache(dtype: torch.dtype, tolerance: float) -> None:
    codec = opened(dtype, 16)
    units = held(codec, draw(0, 2, 4, PAGE, 16, dtype=dtype), draw(1, 2, 4, PAGE, 16, dtype=dtype))
    assert [x.dtype for x in codec.decode(units)] == [dtype, dtype]
    attends_over_codes(codec, units, dense, draw, tolerance, codec.decode(units)[0].abs().amax((1, 2, 3))[:, None, None])


def test_queries_of_bfloat16() -> None:
    codec = opened(BF16, 16)
    units = held(codec, draw(0, 1, 2, PAGE, 16, dtype=BF16), draw(1, 1, 2, PAGE, 16, dtype=BF16))
    attends_with_queries_of_bfloat16(codec, units, dense, draw)


@given(st.integers(0, 2**32), st.sampled_from([F64, F32, BF16]), st.integers(-30, 30))
@settings(max_examples=30, deadline=None)
def test_bounds(seed: int, dtype: torch.dtype, power: int) -> None:
    """The bounds of the module: |q.k' - q.k| <= sum|q| max|k| / 254, and outputs change by at most the largest max|v| / 254."""
    codec = opened(dtype, 16)
    keys, values = (draw(seed + i, 2, 2, PAGE, 16, dtype=dtype) * 10.0**power for i in range(2))
    wide = torch.promote_types(dtype, F32)
    q, weights = draw(seed + 2, 2, 4, 16, dtype=wide, spread=0), draw(seed + 3, 2, 4, 2 * PAGE, dtype=wide).softmax(-1)
    units = held(codec, keys, values)
    rounding = 1 + (1e-3 if wide == F32 else 1e-6)
    least = q.double().abs().sum(-1)[..., None] * keys.double().abs().amax(-1).flatten(1)[:, None] / 254
    error = codec.scores(units, q) - q.double() @ keys.double().flatten(1, 2).mT
    assert (error.abs() <= least * rounding).all()
    error = codec.mix(units, weights) - weights.double() @ values.double().flatten(1, 2)
    assert (error.abs() <= values.double().abs().amax() / 254 * rounding).all()


def test_the_bound_is_met() -> None:
    """A key half a step from its codes everywhere but at its largest element, and a query with its signs, reach the bound."""
    key = torch.tensor([[127] + 63 * [10.4999]], dtype=F64)
    q = torch.ones(1, 1, 64, dtype=F64)
    codec = opened(F64, 64)
    units = held(codec, key.expand(1, 1, PAGE, 64), key.expand(1, 1, PAGE, 64))
    error = float((codec.scores(units, q) - key.sum()).abs().max())
    assert 0.98 * 64 * 127 / 254 < error <= 64 * 127 / 254


@given(st.lists(st.floats(-1e300, 1e300), min_size=4, max_size=4), st.sampled_from([F64, F32, BF16]))
@example([178 * 2.0**-149, 0, -(2.0**-149), 2.0**-148], F32)  # the scale rounds to the least number, two thirds of what it should be
@settings(max_examples=200, deadline=None)
def test_round_trip_of_any_numbers(vector: list[float], dtype: torch.dtype) -> None:
    """Huge, tiny, zero: an element changes by at most half a scale. If float32 has no scale for a vector, all of it is NaN."""
    x = torch.tensor([vector], dtype=dtype)
    codec = opened(dtype, 4)
    back = codec.decode(codec.store(x, -x))
    largest = float(x.double().abs().max())
    if not largest / 127 < torch.finfo(F32).max or not math.isfinite(largest):
        assert back[0].isnan().all() and back[1].isnan().all()
        return
    rounding = {F64: 1e-6, F32: 1e-4, BF16: 1.01}[dtype]  # bfloat16 rounds by largest / 256 what it gives back
    beyond = max(0.0, largest - torch.finfo(F32).max)  # what is given back is float32
    allowed = largest / 254 * (1 + rounding) + 64 * 2.0**-149 + beyond
    assert ((back[0].double() - x.double()).abs() <= allowed).all()
    assert torch.equal(back[1], -back[0])  # negative values are as good as positive ones


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_zeros(dtype: torch.dtype) -> None:
    """Vectors of zeros and zeroed pages decode to zeros."""
    codec, nothing = opened(dtype), torch.zeros(1, 2, PAGE, 8, dtype=dtype)
    fresh = {name: torch.zeros(1, 2, *array.shape, dtype=array.dtype) for name, array in codec.arrays.items()}
    for units in (held(codec, nothing, nothing), fresh):
        assert all(torch.equal(x, nothing) for x in codec.decode(units))
        assert not codec.scores(units, torch.ones(1, 3, 8)).any() and not codec.mix(units, torch.ones(1, 3, 2 * PAGE)).any()
    assert not any(entry.any() for entry in codec.store(nothing + 2.0**-148, nothing).values())  # half of the least scale, if that


def stays_where_it_is(bad: float) -> None:
    codec = opened(F32)
    keys, values = draw(0, 1, 2, PAGE, 8, dtype=F32), draw(1, 1, 2, PAGE, 8, dtype=F32)
    good = held(codec, keys, values)
    keys[0, 1, 5, 3] = values[0, 1, 5, 2] = bad
    units = held(codec, keys, values)
    token = PAGE + 5
    others = torch.arange(2 * PAGE) != token
    for name, array in units.items():
        assert torch.equal(array.flatten(1, 2)[:, others], good[name].flatten(1, 2)[:, others])
    assert all(x.flatten(1, 2)[:, token].isnan().all() for x in codec.decode(units))
    q, weights = draw(2, 1, 3, 8, dtype=F32), draw(3, 1, 3, 2 * PAGE, dtype=F32).softmax(-1)
    weights[0, :2, token] = 0  # two rows do not see it
    scores, out = codec.scores(units, q), codec.mix(units, weights)
    assert scores[..., token].isnan().all() and torch.equal(scores[..., others], codec.scores(good, q)[..., others])
    assert out[0, 2].isnan().all() and torch.equal(out[0, :2], codec.mix(good, weights)[0, :2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_where_it_is(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    stays_where_it_is(bad)
    plain = lambda self, units, w: (w * units["value_scales"].flatten(1)[:, None]) @ units["values"].flatten(1, 2).to(w.dtype)  # noqa: E731
    monkeypatch.setattr(Int8Units, "mix", plain)
    with pytest.raises(AssertionError):
        stays_where_it_is(bad)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_codes_depend_on_their_token_alone(dtype: torch.dtype) -> None:
    """store() of any slots in any grouping, and pack() of their pages, give the same entries."""
    codec = opened(dtype)
    keys, values = draw(0, 3, PAGE, 8, dtype=dtype), draw(1, 3, PAGE, 8, dtype=dtype)
    together = codec.pack(keys, values)
    for cut in (1, 7, 96):
        parts = [codec.store(k, v) for k, v in zip(keys.flatten(0, 1).split(cut), values.flatten(0, 1).split(cut), strict=True)]
        for name, array in together.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), array.flatten(0, 1))


@pytest.mark.parametrize(("dtype", "full"), [(F32, 512), (BF16, 256)])
def test_bytes(dtype: torch.dtype, full: int) -> None:
    """136 bytes of a token and head at D = 64, instead of 512 and 256. The arrays are those of store()."""
    codec = opened(dtype, 64)
    assert Format(codec.name, codec.arrays, codec).bytes == PAGE * (2 * 64 + 8)
    assert 2 * 64 * dtype.itemsize == full
    made = codec.store(draw(0, 5, 64, dtype=dtype), draw(1, 5, 64, dtype=dtype))
    assert list(made) == list(codec.arrays)
    for name, array in codec.arrays.items():
        assert (PAGE, *made[name].shape[1:]) == array.shape and made[name].dtype == array.dtype and not array.whole


def test_claim() -> None:
    assert Int8.card.guarantee == Guarantee.NEAR and (opened().name, opened().block) == ("int8", 0)
