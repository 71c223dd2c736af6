"""The results of every registered quantizer, and the steps of int8 and int4. Every registered method is tested automatically."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from redraft import registry
from redraft.card import Guarantee
from redraft.errors import InvalidInput, UnknownMethod, Unsupported
from redraft.ops.backend import Linear
from redraft.ops.quantized import Quantized, product
from tests.arrays import quantize, same

# Options of a method that are tested in addition to the defaults.
FORMS = {
    "int4": ("group=32", "group=128", "group=adaptive", "group=adaptive,alpha=1", "head=int4", "head=none"),
    "int8": ("outliers=3", "head=none"),
}
MAKERS = [name for name in registry.METHODS["quant"] if not getattr(registry.method("quant", name), "keeps", False)]
EVERY = [f"{name}:{options}".rstrip(":") for name in MAKERS for options in ("", *FORMS.get(name, ()))]
ROLES = ("layer", "head")


def made(text: str) -> Any:
    name = registry.parse(text)[0]
    if name not in registry.METHODS["quant"]:
        pytest.skip(f"{name} is not registered")
    return registry.create("quant", text)


def weight(outs: int, ins: int, seed: int = 0, dtype: torch.dtype = torch.float32, bias: bool = True) -> Linear:
    g = torch.Generator().manual_seed(seed)
    return Linear(torch.randn(outs, ins, generator=g).to(dtype), torch.randn(outs, generator=g).to(dtype) if bias else None)


def quantized(text: str, weights: Linear, role: str = "layer", gains: torch.Tensor | None = None) -> Quantized:
    found = quantize(made(text), weights, role, gains)
    assert isinstance(found, Quantized)
    return found


def error(text: str, weights: Linear, x: torch.Tensor, **given: Any) -> float:
    """The relative error of the product without the bias, by Frobenius norms."""
    exact = x.double() @ weights.weight.double().T
    return float((product(x, quantized(text, Linear(weights.weight), **given)).double() - exact).norm() / exact.norm())


# ---- all of them


@pytest.mark.parametrize("text", EVERY)
def test_a_card_and_a_guarantee_towards_the_model_as_stored(text: str) -> None:
    assert made(text).card.guarantee >= Guarantee.NEAR


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize(("outs", "ins"), [(1, 1), (3, 5), (40, 64), (7, 33), (9, 200), (2, 900)])
def test_every_shape_and_its_size(text: str, role: Any, outs: int, ins: int) -> None:
    method, gains = made(text), torch.arange(ins).float()
    weights = weight(outs, ins, dtype=torch.bfloat16)
    before = weights.weight.clone()
    found = quantize(method, weights, role, gains)
    assert torch.equal(weights.weight, before), "the weight itself is left alone"
    reported = method.bytes(outs, ins, torch.bfloat16, role)
    if found is weights:
        assert reported == 2 * outs * ins
        return
    assert found.shape == (outs, ins) and found.dtype == torch.bfloat16 and torch.equal(found.bias, weights.bias)
    held = found.halved().bytes - 2 * outs
    assert held <= reported and (held == reported or "adaptive" in text)
    assert found.codes.abs().max() <= 127
    again = quantize(method, weights, role, gains)
    assert same(found, again)


@pytest.mark.parametrize("text", EVERY)
def test_really_smaller(text: str) -> None:
    weights = weight(512, 512, dtype=torch.bfloat16, bias=False)
    share = quantized(text, weights, gains=torch.ones(512)).halved().bytes / (2 * 512 * 512)
    assert share < (0.32 if text.startswith("int4") else 0.53)


@pytest.mark.parametrize("text", EVERY)
def test_rows_of_zeros_and_columns_of_zeros(text: str) -> None:
    weights = weight(6, 150)
    weights.weight[2], weights.weight[:, 7], weights.weight[4, :140] = 0, 0, 0
    weights.weight[5] = 1e-45  # no scale is small enough
    found = quantized(text, weights, gains=torch.ones(150))
    assert not found.dense()[2].any() and not found.dense()[:, 7].any() and not found.codes[5].any()
    x = torch.randn(3, 150, generator=torch.Generator().manual_seed(1))
    assert weights.bias is not None and torch.equal(product(x, found)[:, 2], weights.bias[2].expand(3))
    assert product(x, found).isfinite().all()


@pytest.mark.parametrize("text", EVERY)
def test_once_more_changes_nothing(text: str) -> None:
    """Quantizing the dequantized weight gives the same codes."""
    weights, gains = weight(20, 200, bias=False), torch.arange(200).float()
    first = quantized(text, weights, gains=gains)
    second = quantized(text, Linear(first.dense()), gains=gains)
    assert torch.equal(first.codes, second.codes)
    assert torch.allclose(first.dense(), second.dense(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", EVERY)
def test_close_on_gaussian_numbers(text: str) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(2))
    assert error(text, weight(256, 512), x) < (0.015 if text.startswith("int8") else 0.16)


@pytest.mark.parametrize("text", EVERY)
def test_what_is_not_finite_is_refused(text: str) -> None:
    for bad in (float("nan"), float("inf")):
        weights = weight(4, 40)
        weights.weight[1, 3] = bad
        with pytest.raises(Unsupported, match="not finite in float32"):
            quantize(made(text), weights)


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("int8:outliers=-1", "int8:outliers=-1: must be 0 or more"),
        ("int8:outliers=x", "int8:outliers=x: not an int"),
        ("int8:head=int4", "int8:head=int4: must be int8 or none"),
        ("int4:group=48", "int4:group=48: must be 32, 64, 128 or adaptive"),
        ("int4:alpha=0", "int4:alpha=0.0: must be above 0"),
        ("int4:alpha=nan", "int4:alpha=nan: must be above 0"),
        ("int4:head=int2", "int4:head=int2: must be int8, int4 or none"),
    ],
)
def test_errors_name_the_option(text: str, reported: str) -> None:
    if registry.parse(text)[0] not in registry.METHODS["quant"]:
        pytest.skip("not registered")
    with pytest.raises(InvalidInput) as raised:
        registry.create("quant", text)
    assert str(raised.value) == reported


def test_unknown_options() -> None:
    for name in registry.METHODS["quant"]:
        with pytest.raises(UnknownMethod, match=f"unknown option 'bits' of {name}"):
            registry.create("quant", f"{name}:bits=3")


# ---- LLM.int8()


def outlying() -> tuple[Linear, torch.Tensor, torch.Tensor]:
    """A weight after a norm with four gains 30 times the others, and rows from that norm."""
    g = torch.Generator().manual_seed(3)
    gains = torch.ones(256)
    gains[[5, 77, 78, 200]] = 30
    return Linear(torch.randn(64, 256, generator=g) / gains), gains, torch.randn(32, 256, generator=g) * gains


def test_outlier_columns_are_those_that_the_norm_makes_largest() -> None:
    weights, gains, x = outlying()
    found = quantized("int8:outliers=4", weights, gains=gains)
    assert found.columns is not None and found.columns.tolist() == [5, 77, 78, 200]
    assert found.side is not None and torch.equal(found.side, weights.weight[:, found.columns]) and not found.codes[:, found.columns].any()
    plain, kept = error("int8", weights, x, gains=gains), error("int8:outliers=4", weights, x, gains=gains)
    assert kept < 0.015 < 2 * kept < plain
    ties = quantized("int8:outliers=3", weights, gains=torch.ones(256))
    assert ties.columns is not None and ties.columns.tolist() == [0, 1, 2]


def test_all_columns_may_be_outliers_and_none_where_no_norm_stands_in_front() -> None:
    weights, gains, x = outlying()
    assert error("int8:outliers=999", weights, x, gains=gains) < 1e-6
    assert quantized("int8:outliers=4", weights).columns is None
    none = quantized("int8:outliers=0", weights, gains=gains)
    assert none.columns is None and torch.equal(product(x, none), product(x, quantized("int8", weights)))


# ---- FineQuant


def planted(every: int = 100) -> Linear:
    """A Gaussian weight with some entries 15 times as large."""
    weights = weight(64, 1024, bias=False)
    g = torch.Generator().manual_seed(4)
    weights.weight[torch.rand(64, 1024, generator=g) < 1 / every] *= 15
    return weights


def mean_error(found: Quantized, weights: Linear) -> float:
    return float((found.dense() - weights.weight).pow(2).mean())


def test_a_scale_is_that_of_the_largest_weight_of_its_group() -> None:
    weights = weight(5, 100, bias=False)
    found = quantized("int4:group=32", weights)
    assert found.scale.shape == (5, 4) and found.scale.dtype == torch.float16
    for o in range(5):
        for g in range(4):
            own = weights.weight[o, 32 * g : 32 * g + 32]
            largest = max(own.tolist(), key=abs)
            assert found.scale[o, g] == torch.tensor(largest / -8).half()
            steps = own / found.scale[o, g].float()
            assert found.codes[o, 32 * g : 32 * g + 32].tolist() == steps.round().clamp(-8, 7).int().tolist()
            assert found.codes[o, 32 * g + int(own.abs().argmax())] == -8


def test_codes_are_made_with_the_stored_scale() -> None:
    weights = weight(100, 640, bias=False)
    found = quantized("int4:group=64", weights)
    cut = weights.weight.view(100, 10, 64)
    largest = cut.gather(2, cut.abs().argmax(2, keepdim=True))
    with_stored, with_exact = (
        (cut / scale).round().clamp(-8, 7).view(100, 640) for scale in (found.scale[:, :, None].float(), largest / -8)
    )
    assert torch.equal(found.codes.float(), with_stored) and not torch.equal(with_stored, with_exact)


def test_smaller_groups_are_nearer() -> None:
    weights = planted()
    errors = [mean_error(quantized(f"int4:group={group}", weights), weights) for group in (32, 64, 128)]
    assert errors == sorted(errors) and errors[0] < errors[2] / 2


def test_adaptive_groups() -> None:
    """A large alpha never splits: one scale per output. A small alpha always splits: groups of 64. In between, only the weight with
    outliers is split."""
    plain, damaged = weight(64, 1024, bias=False), planted(600)
    never, always = (quantized(f"int4:group=adaptive,alpha={alpha}", damaged) for alpha in ("inf", "1"))
    assert never.scale.shape == (64, 1) and always.scale.shape == (64, 16)
    assert same(always, quantized("int4:group=64", damaged))
    method = "int4:group=adaptive,alpha=1.2"
    kept, split = quantized(method, plain), quantized(method, damaged)
    assert kept.group == 1024 and split.group < 512
    assert mean_error(split, damaged) < mean_error(never, damaged)
    zeros = quantized(method, Linear(torch.zeros(4, 300)))
    assert not zeros.dense().any()


def test_a_heavy_weight_loses_its_neighbours_only_in_its_group() -> None:
    weights = weight(2, 192, bias=False)
    weights.weight[0, 70] = 1e4
    found = quantized("int4:group=64", weights)
    dense = found.dense()
    assert abs(dense[0, 70] - 1e4) < 10 and not dense[0, 64:70].any()
    assert (dense - weights.weight)[0, :64].abs().max() < 0.4


def test_weights_beyond_float16_scales_are_refused() -> None:
    weights = weight(2, 64, bias=False)
    weights.weight[0, 0] = 1e6
    with pytest.raises(Unsupported, match="leaves the range of 4-bit codes"):
        quantize(made("int4"), weights)
