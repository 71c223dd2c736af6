"""The product with quantized weights, against whole numbers, fractions and numpy's float32, operation by operation."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from redraft.ops import quantized
from redraft.ops.arrays import array
from redraft.ops.numpy_ops import NumpyOps
from redraft.ops.quantized import LOW, Quantized, product
from redraft.ops.reference import Reference
from redraft.ops.torch_ops import TorchOps

F32 = np.float32
NUMPY = NumpyOps("float32")


def random(outs: int, ins: int, group: int = 0, *, columns: int = 0, bias: bool = True, seed: int = 0, form: str = "") -> Quantized:
    """Everything that the type allows, even if no method makes it. form: words of "wide", "low" and "tops"."""
    g = torch.Generator().manual_seed(seed)
    low, scale = (-127, torch.rand(outs, generator=g) * 0.1)
    if group:
        low, scale = LOW, (torch.randn(outs, -(-ins // group), generator=g) * 0.1).half()
    more: dict[str, Any] = {"wide": "wide" in form}
    if group and "tops" in form:
        groups = scale.shape[1]
        more |= {"per": 2, "top": (torch.randn(outs, -(-groups // 2), generator=g) * 0.1).half()}
        scale = torch.randint(-32, 64, (outs, groups), generator=g, dtype=torch.int8)
    if group and "low" in form:
        more |= {"low": scale.flip(0), **({"bottom": more["top"].flip(1)} if "tops" in form else {})}
    least, most = (-127, 128) if not group or "wide" in form else (0, 16) if "low" in form else (low, 8)
    codes = torch.randint(least, most, (outs, ins), generator=g, dtype=torch.int8)
    some = torch.randperm(ins, generator=g)[:columns].sort().values if columns else None
    side = None
    if some is not None:
        codes[:, some] = 0
        side = torch.randn(outs, columns, generator=g)
    return Quantized(codes, scale, ins, torch.float32, group, torch.randn(outs, generator=g) if bias else None, some, side, **more)


def rows(count: int, ins: int, seed: int = 1) -> torch.Tensor:
    """Parts of 32 columns have numbers of different sizes, down to a sixtieth."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(-6 * torch.rand(count, -(-ins // 32), generator=g)).repeat_interleave(32, 1)[:, :ins]
    return torch.randn(count, ins, generator=g) * 3 * sizes


def of_group(number: torch.Tensor, top: torch.Tensor | None, w: Quantized, o: int, g: int) -> Fraction:
    """The scale or low of a group."""
    return Fraction(number[o, g].item()) * (1 if top is None else Fraction(top[o, g // w.per].item()))


def rounded(value: Fraction) -> Any:
    """A fraction rounded once to the nearest float32, ties to even."""
    exact = float(value)
    assert Fraction(exact) == value
    return F32(exact)


def defined(x: torch.Tensor, w: Quantized) -> Any:
    """One row by the definition: Python's whole numbers and fractions, numpy's float32."""
    v = x.float().numpy().copy()
    columns = [] if w.columns is None else w.columns.tolist()
    v[columns] = 0
    m = F32(np.abs(v).max())
    s = m / F32(127)
    with np.errstate(divide="ignore", over="ignore"):
        r = F32(127) / m
    r = r if np.isfinite(r) else F32(0)
    powers = np.ones(len(v), F32)
    for first in range(0, len(v), w.group) if w.grouped else []:
        own = slice(first, first + w.group)
        with np.errstate(over="ignore"):
            powers[own] = max(F32(2**k) for k in range(5) if np.abs(v[own]).max() * F32(2**k) <= m)
    code = [int(c) for c in np.rint(v * powers * r)]
    weights, out = w.whole().tolist(), []
    for o, line in enumerate(weights):
        if w.grouped:
            total = F32(0)
            for g in range(w.scale.shape[1]):
                own = range(g * w.group, min(w.ins, (g + 1) * w.group))
                power = int(powers[own[0]])
                sums = Fraction(sum(code[i] * line[i] for i in own), power)
                total = rounded(sums * of_group(w.scale, w.top, w, o, g) + Fraction(float(total)))
                if w.low is not None:
                    total = rounded(
                        Fraction(sum(code[i] for i in own), power) * of_group(w.low, w.bottom, w, o, g) + Fraction(float(total))
                    )
            y = total * s
        else:
            y = F32(sum(a * b for a, b in zip(code, line, strict=True))) * (s * F32(w.scale[o].item()))
        for j, column in enumerate(columns):
            assert w.side is not None
            y = y + F32(x[column].item()) * F32(w.side[o, j].item())
        out.append(y if w.bias is None else y + F32(w.bias[o].item()))
    return np.array(out, F32)


SHAPES = [(5, 7, 0), (9, 64, 0), (33, 130, 0), (6, 96, 32), (8, 100, 32), (5, 7, 64), (17, 129, 64), (4, 320, 512), (3, 301, 128)]
FORMS = ["", "wide", "low", "tops", "low tops", "wide tops", "wide low tops"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [0, 3])
@pytest.mark.parametrize(("outs", "ins", "group"), SHAPES)
def test_each_bit_is_the_definition(outs: int, ins: int, group: int, columns: int, form: str) -> None:
    """Groups larger than ins, ins that no group divides, odd ins; outlier columns; packed or not; all forms; all backends."""
    if form and not group:
        pytest.skip("a form of groups")
    w, x = random(outs, ins, group, columns=columns, form=form), rows(4, ins)
    expected = np.stack([defined(row, w) for row in x])
    backend = TorchOps(torch.float32)
    for form in (w, w.halved()):
        assert np.array_equal(product(x, form).numpy(), expected)
        assert np.array_equal(backend.linear(x, form).numpy(), expected)
        assert np.array_equal(Reference().linear(x.double(), form).numpy(), expected.astype(np.float64))
    assert np.array_equal(backend.linear(x, backend.pack(w)).numpy(), expected)
    assert np.array_equal(NUMPY.linear(x.numpy(), NUMPY.pack(w)), expected)


def one_sided() -> tuple[torch.Tensor, Quantized]:
    """The sums are so large that a product with a float16 scale does not fit float32, which makes fused operations visible."""
    w = random(17, 2100, 512, bias=False)
    return rows(4, 2100).abs(), replace(w, codes=w.codes.abs().clamp(max=7))


def test_sums_are_fused_with_their_scales() -> None:
    x, w = one_sided()
    expected = np.stack([defined(row, w) for row in x])
    for y in (product(x, w), product(x, w.halved()), Reference().linear(x.double(), w).float()):
        assert np.array_equal(y.numpy(), expected)


def test_codes_at_the_border_between_two() -> None:
    """Numbers half way between two codes, where the last bit of 127 / max decides; a product with an inverse decides otherwise."""
    m = torch.rand(500, 1, generator=torch.Generator().manual_seed(5)) + 0.5
    v = torch.cat([m, (torch.arange(-126, 126) + 0.5) * m / 127], 1)
    inverse = np.full((500, 1), 127, F32) / m.numpy()
    codes, s, _ = quantized.row_codes(v, None)
    assert np.array_equal(codes.numpy(), np.rint(v.numpy() * inverse).astype(np.int8))
    assert np.array_equal(s.numpy(), m.numpy() / np.full((500, 1), 127, F32))
    assert not torch.equal(codes, (v * (m.reciprocal() * 127)).round().to(torch.int8)), "the border is not met"


def test_an_order_or_a_rounding_that_differs_is_seen() -> None:
    """Every similar formula gives other bits on the data of these tests, so the tests do enforce the definition."""
    w, x = random(33, 130, columns=3), rows(4, 130)
    codes, s, _ = quantized.row_codes(x, w.columns)
    acc = (codes.long() @ w.codes.long().T).float()
    right = replace(w, bias=None, columns=None, side=None)
    v = x.index_fill(1, w.columns, 0) if w.columns is not None else x
    assert torch.equal(product(v, right), acc * (s * w.scale))
    assert not torch.equal(product(v, right), acc * s * w.scale)
    reciprocal = v * (1 / (v.abs().amax(1, keepdim=True) / 127))
    assert not torch.equal(reciprocal, v * (torch.full((4, 1), 127.0) / v.abs().amax(1, keepdim=True)))
    x, w = one_sided()
    codes, s, powers = quantized.row_codes(x, None, 512)
    assert powers is not None
    plain, backwards = torch.zeros(4, 17), torch.zeros(4, 17)
    for total, order in ((plain, range(5)), (backwards, reversed(range(5)))):
        for g in order:
            own = slice(512 * g, 512 * (g + 1))
            total += (codes[:, own].long() @ w.codes[:, own].long().T).float() / powers[:, g, None] * w.scale[:, g].float()
    assert not torch.equal(product(x, w), plain * s) and not torch.equal(product(x, w), backwards * s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("w", [random(70, 200, columns=2), random(70, 200, 64).halved(), random(70, 200, 32)], ids=["8", "4 halved", "4"])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(w: Quantized, dtype: torch.dtype) -> None:
    x = rows(40, 200).to(dtype)
    every = product(x, w)
    assert every.dtype == dtype and len({tuple(row.tolist()) for row in every}) == 40
    for i in range(40):
        assert torch.equal(product(x[i : i + 1], w)[0], every[i])
    for first, last in ((0, 2), (3, 20), (5, 38)):
        assert torch.equal(product(x[first:last], w), every[first:last])
    if dtype != torch.float16:
        assert array(every).tobytes() == NUMPY.linear(array(x), NUMPY.pack(w)).tobytes()
    neighbours = torch.cat([x[:1], rows(3, 200, seed=9).to(dtype) * 1e4])
    assert torch.equal(product(neighbours, w)[0], every[0])


@pytest.mark.parametrize("group", [0, 64])
def test_rows_of_zeros_tiny_and_huge_numbers(group: int) -> None:
    w = random(9, 130, group)
    assert w.bias is not None
    x = rows(7, 130)
    x[0], x[1], x[2] = 0, 1e-42, -1e-37
    x[3, 5] = 3e38
    x[4, 3], x[5, 3] = float("nan"), float("inf")
    with np.errstate(over="ignore"):
        expected = np.stack([defined(row, w) for row in x[[0, 1, 2, 3, 6]]])
    mine = torch.from_numpy(NUMPY.linear(x.numpy(), NUMPY.pack(w)))
    for y in (product(x, w), product(x, w.halved()), mine, Reference().linear(x.double(), w).float()):
        assert np.array_equal(y[[0, 1, 2, 3, 6]].numpy(), expected)
        assert torch.equal(y[0], w.bias)
        assert y[4:6].isnan().all()
    assert product(x[:0], w).shape == Reference().linear(x[:0].double(), w).shape == (0, 9)


def test_sums_are_exact_where_the_machine_multiplies_inexactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other implementation, used if the probe fails. The probe fails if pairs saturate."""
    full = Quantized(torch.full((3, 5000), 127, dtype=torch.int8), torch.ones(3), 5000, torch.float32)
    x = torch.cat([torch.ones(1, 5000), rows(6, 5000)])
    here, four = product(x, full), [product(x[:, :130], w := random(9, 130, 64).halved()), w]
    monkeypatch.setattr(quantized, "_integer_product_is_exact", lambda: False)
    assert torch.equal(product(x, full), here) and torch.equal(product(x[:, :130], four[1]), four[0])
    assert here[0, 0] == torch.tensor(127.0 * 127 * 5000) * (torch.tensor(1.0) / 127)
    monkeypatch.undo()
    assert quantized._integer_product_is_exact.__wrapped__()
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: (x.float() @ w.float()).clamp(-32768, 32767).int())
    assert not quantized._integer_product_is_exact.__wrapped__()


@pytest.mark.parametrize("w", [random(9, 31, columns=2), random(9, 31, 32), random(9, 130, 64)], ids=str)
def test_forms(w: Quantized) -> None:
    """Packed and unpacked codes are equal; rows() is the weight of some outputs; dense() is the dequantized weight."""
    halved, keep = w.halved(), np.array([0, 3, 8])
    assert torch.equal(halved.whole(), w.codes) and halved.shape == w.shape and halved.halved() is halved
    assert halved.bytes < w.bytes or not w.grouped
    x = rows(3, w.ins)
    assert torch.equal(product(x, halved.rows(keep)), product(x, halved)[:, keep])
    dense = torch.nn.functional.linear(x.double(), w.dense().double(), w.bias.double() if w.bias is not None else None)
    limit = 0.5 * x.abs().amax() / 127 * w.dense().abs().sum(1).max() + 1e-3  # half a step of the row in every column
    assert (product(x, w).double() - dense).abs().max() < limit
    assert torch.equal(halved.dense(), w.dense())
