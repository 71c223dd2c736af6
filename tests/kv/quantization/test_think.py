"""ThinK: the channels that it keeps, its products against keys with zeros, compiled too, and its calibration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from redraft import LLM
from redraft.errors import CheckpointError, InvalidInput, Unsupported
from redraft.kv.quantization.think import Queries, ThinK, ThinUnits
from redraft.models.trained import model_hash
from redraft.ops.format import PAGE, Format
from tests.kv.quantization.compiled import attends, same_in_any_batch

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SIZE, LANES = 16, 4
QUERIES = np.random.default_rng(0).random((2, 2, 64), np.float32)


def opened(dtype: torch.dtype = F64, size: int = SIZE, kept: int = 9) -> ThinUnits:
    return ThinUnits(size, dtype, PAGE, kept, QUERIES[..., :size])


def draw(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=F64) * torch.rand(shape[-1], generator=generator, dtype=F64)).to(dtype)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("embedded", draft="none", dtype="float32")


@pytest.mark.parametrize("dtype", [F64, BF16])
def test_the_channels_with_the_largest_products_stay(dtype: torch.dtype) -> None:
    keys, values = draw(0, LANES, PAGE, SIZE, dtype=dtype), draw(1, LANES, PAGE, SIZE, dtype=dtype)
    keys[1, :, 5] = 0  # of no use to any query
    units = opened(dtype).pack(keys, values, np.arange(LANES, dtype=np.int32))
    back, same = opened(dtype).decode(units)
    assert torch.equal(same, values) and 5 not in units["channels"][1].tolist()
    for lane in range(LANES):
        weight = torch.tensor(QUERIES.reshape(-1, 64)[lane, :SIZE]).double() * keys[lane].double().square().mean(0)
        best = sorted(weight.argsort(descending=True, stable=True)[:9].tolist())
        assert units["channels"][lane].tolist() == best
        zeroed = keys[lane].clone()
        zeroed[:, [c for c in range(SIZE) if c not in best]] = 0
        assert torch.equal(back[lane], zeroed)


def test_the_channels_are_those_of_the_lane() -> None:
    keys, values = draw(0, 1, PAGE, SIZE).expand(2, PAGE, SIZE), draw(1, 2, PAGE, SIZE)
    found = [opened().pack(keys, values, np.array(lanes, np.int32))["channels"].tolist() for lanes in ([0, 3], [3, 0])]
    assert found[0] == found[1][::-1] and found[0][0] != found[0][1]


def test_attention_is_attention_over_zeroed_channels() -> None:
    codec = opened()
    made = codec.pack(draw(0, 6, PAGE, SIZE), draw(1, 6, PAGE, SIZE), np.arange(6, dtype=np.int32) % LANES)
    units = {name: array.reshape(2, 3, *array.shape[1:]) for name, array in made.items()}
    keys, values = (x.flatten(1, 2) for x in codec.decode(units))
    q, weights = draw(2, 2, 5, SIZE), draw(3, 2, 5, 3 * PAGE)
    torch.testing.assert_close(codec.scores(units, q), q @ keys.mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(codec.mix(units, weights), weights @ values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("size", "kept"), [(16, 9), (24, 24), (64, 39), (64, 1)])
def test_kernels_read_it(size: int, kept: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    attends(opened(dtype, size, kept), size, monkeypatch)


def test_a_share_leaves_out_the_whole_number_below_it(llm: LLM, tmp_path: Path) -> None:
    size = llm.runner.spec.head_dim
    path = calibrated(llm).save(tmp_path / "mine.safetensors")
    for share in (0.1, 0.4, 0.5, 0.99):
        made = ThinK(share, profile=path).open(llm.runner)
        assert made is not None and made.kept == size - int(share * size)


def test_a_share_of_nothing_is_no_codec(llm: LLM) -> None:
    """It needs no calibration, and prefixes stay shared."""
    assert ThinK(0.0).open(llm.runner) is None
    assert llm.engine.policies.check(llm.params(None).but(codec="think:share=0")).encoded == ""


def test_bytes() -> None:
    """Of a token and head at D = 64 in bfloat16."""
    codec = opened(BF16, 64, 39)
    assert Format(codec.name, codec.arrays, codec).bytes == PAGE * 2 * (39 + 64) + 48  # 39 channels, aligned
    made = codec.pack(draw(0, 3, PAGE, 64, dtype=BF16), draw(1, 3, PAGE, 64, dtype=BF16), np.arange(3, dtype=np.int32))
    assert list(made) == list(codec.arrays)
    assert all(made[name].shape == (3, *array.shape) and made[name].dtype == array.dtype for name, array in codec.arrays.items())


# ---- the calibration


def calibrated(llm: LLM) -> Queries:
    return ThinK.calibrate(llm.runner, [list(range(3, 90)), list(range(40, 80))])


def test_the_calibration_is_the_mean_square_of_queries(llm: LLM) -> None:
    found, spec = calibrated(llm), llm.runner.spec
    assert found.scores.shape == (len(spec.layers), spec.kv_heads, spec.head_dim) and (found.texts, found.tokens) == (2, 127)
    rows: list[Any] = []
    attend = type(llm.runner.backend).attend

    def noted(self: Any, index: int, layer: Any, q: Any, *rest: Any) -> Any:
        rows.append((index, np.asarray(q, np.float64)))
        return attend(self, index, layer, q, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(llm.runner.backend), "attend", noted)
        calibrated(llm)
    first = np.concatenate([q for index, q in rows if index == 0])
    squares = (first.reshape(len(first), spec.kv_heads, -1, spec.head_dim) ** 2).mean((0, 2))
    np.testing.assert_allclose(found.scores[0], squares, rtol=1e-5)


def test_a_file_is_found_and_refused_for_others(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InvalidInput, match=r"think: no profile .*redraft calibrate .* --method think --texts FILE"):
        ThinK().open(llm.runner)
    found = calibrated(llm)
    assert found.save().stem == model_hash(llm.runner) and ThinK().open(llm.runner) is not None
    other = Queries(found.scores, "another model", 1, 1).save(tmp_path / "other.safetensors")
    with pytest.raises(InvalidInput, match=r"think: .* was made for the model with hash another model"):
        ThinK(profile=other).open(llm.runner)
    nothing = Queries(0 * found.scores, found.model, 1, 1).save(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="all scores are 0"):
        ThinK(profile=nothing).open(llm.runner)


def test_a_text_is_the_same_in_any_batch(tmp_path: Path) -> None:
    llm = LLM("embedded", draft="none", backend="native", dtype="bfloat16")
    path = calibrated(llm).save(tmp_path / "mine.safetensors")
    same_in_any_batch(f"think:block=32,profile={path}")


def test_what_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidInput, match="think:share=1"):
        ThinK(1.0)
    with pytest.raises(Unsupported, match="think: the head size 320 is above 256"):
        ThinK().open(SimpleNamespace(spec=SimpleNamespace(head_dim=320)))  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="whole pages"):
        opened().store(torch.zeros(1, SIZE), torch.zeros(1, SIZE))
