"""MiKV: its balancer, attention over its codes, compiled too, and texts under a keep policy whose evictions it stores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from redraft import LLM, SamplingParams
from redraft.core.sequence import UNLIMITED, Request
from redraft.errors import InvalidInput, Unsupported
from redraft.kv.quantization.mikv import BalancedUnits, MiKV, Queries
from redraft.ops.arrays import numpy_dtype
from redraft.ops.format import PAGE, Format, plain
from tests.kv.quantization.compiled import attends, same_in_any_batch

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SIZE, LANES = 16, 4
QUERIES = np.random.default_rng(0).random((2, 2, 64), np.float32) * 8
KEEP = "snapkv:budget=0.3,window=4,pool=3,sinks=1"
PROMPT = [*range(5, 105)]


def opened(dtype: Any = F64, size: int = SIZE, bits: int = 2, balance: bool = True) -> BalancedUnits:
    return BalancedUnits(size, dtype, bits, QUERIES[..., :size] if balance else None)


def draw(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    """Channels of unequal size, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=F64) * torch.rand(shape[-1], generator=generator, dtype=F64) ** 3).to(dtype)


def lanes(count: int) -> Any:
    return np.arange(count, dtype=np.int32) % LANES


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("embedded", draft="none", dtype="float32")


# ---- the codec


def test_the_balancer_is_that_of_the_paper() -> None:
    keys = draw(0, LANES, PAGE, SIZE)
    keys[1, :, 3] = 0
    found = opened().pack(keys, keys, lanes(LANES))["balance"]
    largest = keys.abs().amax(-2).clamp(min=1e-5)
    right = (torch.tensor(QUERIES.reshape(-1, 64)[:, :SIZE]).double() / largest).sqrt()
    torch.testing.assert_close(1 / found, right)
    assert torch.equal(opened(balance=False).pack(keys, keys)["balance"], torch.ones(LANES, SIZE, dtype=F64))


@given(st.integers(0, 2**32), st.sampled_from([2, 4]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_an_element_changes_by_half_a_step_at_most(seed: int, bits: int, balance: bool) -> None:
    keys, values = draw(seed, LANES, PAGE, SIZE), draw(seed + 1, LANES, PAGE, SIZE)
    codec = opened(bits=bits, balance=balance)
    units = codec.pack(keys, values, lanes(LANES))
    for x, back, name, factor in zip((keys, values), codec.decode(units), ("key", "value"), (units["balance"], None), strict=True):
        error = (back - x).abs() / (1 if factor is None else factor[:, None, :])
        assert (error <= units[f"{name}_scales"][..., None] / 2 * (1 + 1e-9) + 1e-12).all()


def test_equal_elements_are_exact_and_what_is_not_finite_spoils_its_token() -> None:
    codec = opened(F32, balance=False)
    keys, values = torch.full((2, PAGE, SIZE), 2.5), draw(1, 2, PAGE, SIZE, dtype=F32)
    good = codec.decode(codec.pack(keys, values))
    assert torch.equal(good[0], keys)
    keys[1, 5, 3] = values[1, 7, 2] = float("nan")
    for mine, right, token in zip(codec.decode(codec.pack(keys, values)), good, (5, 7), strict=True):
        others = [i for i in range(PAGE) if i != token]
        assert torch.equal(mine[:, others], right[:, others]) and mine[1, token].isnan().any()
    codec = opened(F32)
    keys = draw(3, 2, PAGE, SIZE, dtype=F32)
    keys[1, 5, 3] = float("inf")
    back = codec.decode(codec.pack(keys, values, lanes(2)))[0]
    assert back[1, :5].isfinite().all() and not back[1, 5].isfinite().all()


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_attention_is_attention_over_the_decoded_cache(bits: int, balance: bool) -> None:
    codec = opened(bits=bits, balance=balance)
    made = codec.pack(draw(0, 6, PAGE, SIZE), draw(1, 6, PAGE, SIZE), lanes(6))
    units = {name: array.reshape(2, 3, *array.shape[1:]) for name, array in made.items()}
    keys, values = (x.flatten(1, 2) for x in codec.decode(units))
    q, weights = draw(2, 2, 5, SIZE), draw(3, 2, 5, 3 * PAGE)
    torch.testing.assert_close(codec.scores(units, q), q @ keys.mT, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(codec.mix(units, weights), weights @ values, rtol=1e-9, atol=1e-9)


def test_bits_depend_on_the_unit_alone() -> None:
    codec = opened(numpy_dtype(F32))
    keys, values = (draw(seed, 5, PAGE, SIZE, dtype=F32).numpy() for seed in (0, 1))
    together = codec.pack(keys, values, lanes(5))
    alone = [codec.pack(keys[i : i + 1], values[i : i + 1], lanes(5)[i : i + 1]) for i in range(5)]
    for name, array in together.items():
        assert np.array_equal(np.concatenate([one[name] for one in alone]), array), name


def test_two_bits_are_nearer_to_the_output_than_dropping() -> None:
    """The output of attention with three quarters of the slots dropped, or coded. Of 40 draws, coded is nearer in nearly all."""
    codec, nearer = opened(), 0
    for seed in range(40):
        keys, values = draw(seed, 1, 4 * PAGE, SIZE), draw(seed + 1000, 1, 4 * PAGE, SIZE)
        q = draw(seed + 2000, 1, 1, SIZE)
        right = (q @ keys.mT).softmax(-1) @ values
        held = codec.decode(codec.pack(keys[:, PAGE:].view(3, PAGE, SIZE), values[:, PAGE:].view(3, PAGE, SIZE), lanes(3)))
        k, v = (torch.cat([x[:, :PAGE], back.view(1, -1, SIZE)], 1) for x, back in zip((keys, values), held, strict=True))
        coded = (q @ k.mT).softmax(-1) @ v
        dropped = (q @ keys[:, :PAGE].mT).softmax(-1) @ values[:, :PAGE]
        nearer += int((coded - right).norm() < (dropped - right).norm())
    assert nearer >= 36


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("size", "bits"), [(16, 2), (24, 4), (64, 2), (64, 4)])
def test_kernels_read_it(size: int, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    attends(opened(dtype, size, bits), size, monkeypatch)


@pytest.mark.parametrize(("bits", "taken"), [(2, 44), (4, 76)])
def test_bytes(bits: int, taken: int) -> None:
    """Of a token and head at D = 64 in bfloat16."""
    codec = opened(BF16, 64, bits)
    assert Format(codec.name, codec.arrays, codec).bytes == PAGE * taken
    made = codec.pack(draw(0, 3, PAGE, 64, dtype=BF16), draw(1, 3, PAGE, 64, dtype=BF16), lanes(3))
    assert list(made) == list(codec.arrays)
    assert all(made[name].shape == (3, *array.shape) and made[name].dtype == array.dtype for name, array in codec.arrays.items())


# ---- the calibration


def test_the_calibration_is_the_largest_query(llm: LLM, tmp_path: Path) -> None:
    found, spec = MiKV.calibrate(llm.runner, [list(range(3, 90)), list(range(40, 80))]), llm.runner.spec
    assert found.scores.shape == (len(spec.layers), spec.kv_heads, spec.head_dim) and (found.texts, found.tokens) == (2, 127)
    one, other = (MiKV.calibrate(llm.runner, [text]).scores for text in (list(range(3, 90)), list(range(40, 80))))
    assert np.array_equal(found.scores, np.maximum(one, other)) and found.scores.min() > 0
    path = found.save(tmp_path / "mine.safetensors")
    assert np.array_equal(Queries.load(path).scores, found.scores)
    assert MiKV(profile=path).open(llm.runner).name != MiKV(balance=False).open(llm.runner).name


# ---- texts


def params(**choice: str) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=40, logprobs=1, ignore_eos=True, **choice)


def test_no_token_is_dropped(llm: LLM) -> None:
    """Of a text in progress: every position has one slot in each lane, and full pages of what the policy gave up are codes."""
    engine = llm.engine
    engine.add(Request("r", list(PROMPT), params(keep=KEEP, codec="mikv:balance=false")))
    engine.step()
    (seq,) = engine.running
    while seq.generated < 20:
        engine.step()
    for lane in engine.runner.memory.paged.table._held[seq.id].lanes:
        assert lane.positions is not None and sorted(lane.positions[: lane.length].tolist()) == list(range(seq.stored))
        assert lane.demoted == 70 and len(lane.encoded) == 2 and lane.length == seq.stored
    engine.abort("r")


class ExactUnits:
    """A codec that loses nothing."""

    name, block = "exact", UNLIMITED

    def __init__(self, runner: Any) -> None:
        self.arrays = plain(runner.backend.dtype, runner.spec.head_dim)

    def pack(self, keys: Tensor, values: Tensor, lanes: Any = None) -> dict[str, Tensor]:
        return {"keys": keys, "values": values}

    def scores(self, held: Any, q: Tensor) -> Tensor:
        return q @ held["keys"].flatten(1, 2).mT

    def mix(self, held: Any, weights: Tensor) -> Tensor:
        return weights @ held["values"].flatten(1, 2)


@pytest.mark.parametrize("keep", [KEEP, "h2o:budget=20,drop=8", "ada-kv:budget=0.3,window=4,pool=3,sinks=1,floor=0"])
def test_codes_that_lose_nothing_change_nothing(keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots are read in another order, which changes the last digits only."""
    monkeypatch.setattr(MiKV, "open", lambda _, runner: ExactUnits(runner))
    llm = LLM("embedded", draft="none", dtype="float64", backend="torch")
    right, found = (llm.generate(PROMPT, params(**choice))[0].outputs[0] for choice in ({}, {"keep": keep, "codec": "mikv"}))
    assert found.token_ids == right.token_ids
    for mine, other in zip(found.logprobs or (), right.logprobs or (), strict=True):
        assert dict(mine.top) == pytest.approx(dict(other.top), abs=1e-9)


@pytest.mark.parametrize("keep", [KEEP, "h2o:budget=20,drop=8"])
def test_a_text_is_the_same_in_any_batch(keep: str) -> None:
    same_in_any_batch("mikv:balance=false", keep=keep)


def test_what_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidInput, match="mikv:bits=3: must be 2 or 4"):
        MiKV(3)
    with pytest.raises(InvalidInput, match=r"mikv: no profile .*redraft calibrate .* --method mikv --texts FILE"):
        MiKV(profile=Path("nowhere")).open(llm.runner)
    with pytest.raises(Unsupported, match="whole pages"):
        opened().store(torch.zeros(1, SIZE), torch.zeros(1, SIZE))
    with pytest.raises(Unsupported, match="packs 4 channels into a byte"):
        MiKV(balance=False).open(SimpleNamespace(spec=SimpleNamespace(head_dim=18), backend=SimpleNamespace(dtype=F64)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({}, "encodes what a keep policy would evict; choose a keep policy too"),
        ({"keep": "streaming-llm:sinks=2,recent=14"}, "hides what it evicts"),
        ({"keep": "kvmerger:similar=0.1"}, "writes slots that it keeps"),
        ({"keep": KEEP, "read": "page-top-k"}, "a sparse read knows the pages of the text"),
    ],
)
def test_what_it_does_not_combine_with(llm: LLM, more: dict[str, str], why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        llm.engine.policies.check(params(codec="mikv:balance=false", **more))
