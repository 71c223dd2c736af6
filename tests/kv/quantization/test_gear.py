"""GEAR: its parts against their definition, and attention over them, compiled too, against the decoded cache."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from redraft.card import Guarantee
from redraft.errors import InvalidInput, Unsupported
from redraft.kv.quantization.gear import GEAR, RepairedUnits
from redraft.kv.quantization.kivi import KIVI
from redraft.ops.arrays import numpy_dtype
from redraft.ops.format import PAGE, Format
from tests.kv.quantization.compiled import attends, same_in_any_batch

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SIZE = 16


def runner(dtype: Any = F64, size: int = SIZE) -> Any:
    return SimpleNamespace(spec=SimpleNamespace(head_dim=size), backend=SimpleNamespace(dtype=dtype))


def opened(dtype: Any = F64, size: int = SIZE, **options: Any) -> Any:
    return GEAR(**options).open(runner(dtype, size))


def draw(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    """Normal numbers with another mean in each channel, and a few far from it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=F64) + 3 * torch.randn(shape[-1], generator=generator, dtype=F64)
    return torch.where(torch.rand(*shape, generator=generator, dtype=F64) < 0.02, 20 * x, x).to(dtype)


def errors(codec: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of each unit: the norm of what keys and values lose."""
    back = codec.decode(codec.pack(keys, values))
    return tuple((mine.double() - x.double()).flatten(1).norm(dim=1) for mine, x in zip(back, (keys, values), strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [F64, BF16])
def test_without_repairs_it_is_kivi_bit_for_bit(dtype: torch.dtype, bits: int) -> None:
    mine, base = opened(dtype, bits=bits, rank=0, outliers=0), KIVI(bits).open(runner(dtype))
    keys, values = draw(0, 3, PAGE, SIZE, dtype=dtype), draw(1, 3, PAGE, SIZE, dtype=dtype)
    assert mine.name == base.name and mine.layout == base.layout and list(mine.arrays) == list(base.arrays)
    assert all(torch.equal(mine.pack(keys, values)[name], array) for name, array in base.pack(keys, values).items())


@given(st.integers(0, 2**32), st.sampled_from([2, 4]), st.sampled_from([0, 1, 2]))
@settings(max_examples=15, deadline=None)
def test_the_error_does_not_rise_with_the_rank(seed: int, bits: int, outliers: int) -> None:
    keys, values = draw(seed, 2, PAGE, SIZE), draw(seed + 1, 2, PAGE, SIZE)
    found = [errors(opened(bits=bits, rank=rank, outliers=outliers), keys, values) for rank in range(5)]
    for less, more in pairwise(found):
        assert all((b <= a * (1 + 1e-9)).all() for a, b in zip(less, more, strict=True))
    assert all((b < a).all() for a, b in zip(found[0], found[-1], strict=True))


def test_all_ranks_are_exact() -> None:
    """A residual of 8 channels has rank 8 at most."""
    keys, values = draw(0, 2, PAGE, 8), draw(1, 2, PAGE, 8)
    for loss in errors(opened(size=8, rank=8, outliers=0), keys, values):
        assert loss.max() < 1e-9


def test_outliers_are_exact_and_the_grid_covers_the_others() -> None:
    keys, values = draw(2, 4, PAGE, SIZE), draw(3, 4, PAGE, SIZE)
    codec = opened(outliers=2, rank=1)
    units = codec.pack(keys, values)
    for x, back, name, along in zip((keys, values), codec.decode(units), ("key", "value"), (-2, -1), strict=True):
        places = units[f"{name}_places"].long()
        torch.testing.assert_close(back.gather(along, places), x.gather(along, places), rtol=1e-12, atol=1e-12)
        ordered = x.sort(along).values
        size = x.shape[along]
        assert torch.equal(
            x.gather(along, places).sort(along).values, ordered.index_select(along % 3, torch.tensor([0, 1, size - 2, size - 1]))
        )
        inner = ordered.narrow(along, 2, size - 4)
        assert torch.equal(units[f"{name}_zeros"], inner.amin(along))
        torch.testing.assert_close(units[f"{name}_scales"], (inner.amax(along) - inner.amin(along)) / 3)


def test_outliers_lower_the_error_of_heavy_tails() -> None:
    keys, values = draw(4, 20, PAGE, SIZE), draw(5, 20, PAGE, SIZE)
    for bare, less in zip(errors(opened(rank=0, outliers=0), keys, values), errors(opened(rank=0, outliers=1), keys, values), strict=True):
        assert (less < bare).all()


def test_groups_without_a_range_are_exact() -> None:
    keys, values = torch.full((1, PAGE, SIZE), 2.5, dtype=F64), torch.zeros(1, PAGE, SIZE, dtype=F64)
    codec = opened(rank=2, outliers=1)
    assert all(torch.equal(mine, x) for mine, x in zip(codec.decode(codec.pack(keys, values)), (keys, values), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_no_other_unit(bad: float) -> None:
    keys, values = draw(0, 2, PAGE, SIZE, dtype=F32), draw(1, 2, PAGE, SIZE, dtype=F32)
    codec = opened(F32)
    good = codec.decode(codec.pack(keys, values))
    keys[1, 5, 3] = values[1, 7, 2] = bad
    for mine, right in zip(codec.decode(codec.pack(keys, values)), good, strict=True):
        assert torch.equal(mine[0], right[0]) and not mine[1].isfinite().all()


@pytest.mark.parametrize("options", [{}, {"rank": 2, "outliers": 0}, {"rank": 0, "outliers": 2}, {"bits": 4}], ids=str)
def test_attention_is_attention_over_the_decoded_cache(options: dict[str, int]) -> None:
    codec = opened(**options)
    made = codec.pack(draw(0, 6, PAGE, SIZE), draw(1, 6, PAGE, SIZE))
    units = {name: array.reshape(2, 3, *array.shape[1:]) for name, array in made.items()}
    keys, values = (x.flatten(1, 2) for x in codec.decode(units))
    q, weights = draw(2, 2, 5, SIZE), draw(3, 2, 5, 3 * PAGE)
    torch.testing.assert_close(codec.scores(units, q), q @ keys.mT, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(codec.mix(units, weights), weights @ values, rtol=1e-9, atol=1e-9)


def test_bits_depend_on_the_unit_alone() -> None:
    """With NumPy, in whose order compiled kernels read them."""
    codec = opened(numpy_dtype(F32), rank=2)
    keys, values = (draw(seed, 5, PAGE, SIZE, dtype=F32).numpy() for seed in (0, 1))
    together = codec.pack(keys, values)
    alone = [codec.pack(keys[i : i + 1], values[i : i + 1]) for i in range(5)]
    for name, array in together.items():
        assert np.array_equal(np.concatenate([one[name] for one in alone]), array), name


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("options", [{}, {"rank": 2, "outliers": 0}, {"rank": 0, "outliers": 2, "bits": 4}], ids=str)
@pytest.mark.parametrize("size", [16, 24, 64])
def test_kernels_read_it(size: int, options: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    attends(opened(dtype, size, **options), size, monkeypatch)


def test_a_text_is_the_same_in_any_batch() -> None:
    same_in_any_batch("gear:block=32")


@pytest.mark.parametrize(("options", "taken"), [({}, 44 + 12 + 18), ({"rank": 2, "outliers": 0}, 44 + 24), ({"bits": 4}, 76 + 12 + 18)])
def test_bytes(options: dict[str, int], taken: int) -> None:
    """Of a token and head at D = 64 in bfloat16."""
    codec = opened(BF16, 64, **options)
    assert Format(codec.name, codec.arrays, codec).bytes == PAGE * taken
    made = codec.pack(draw(0, 3, PAGE, 64, dtype=BF16), draw(1, 3, PAGE, 64, dtype=BF16))
    assert list(made) == list(codec.arrays)
    assert all(made[name].shape == (3, *array.shape) and made[name].dtype == array.dtype for name, array in codec.arrays.items())


def test_what_is_refused() -> None:
    with pytest.raises(InvalidInput, match="gear:bits=3: must be 2 or 4"):
        GEAR(bits=3)
    with pytest.raises(InvalidInput, match="gear:rank=9"):
        GEAR(rank=9)
    with pytest.raises(Unsupported, match="gear:outliers=2: the head size 4 is not in 5 to 256"):
        RepairedUnits(4, F64, PAGE, 2, 1, 2)
    assert GEAR.card.guarantee == Guarantee.LOSSY
