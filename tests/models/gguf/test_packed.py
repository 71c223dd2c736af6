"""Quantized tensors that are not decoded: the numbers of `gguf.quants.dequantize`, bit for bit, and the same texts with drafts."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from redraft import LLM
from redraft.core.spec import WeightSource
from redraft.errors import Unsupported
from redraft.models.gguf.file import Record
from redraft.models.gguf.packed import FORMS, packed_bytes, quantized
from redraft.ops import library
from redraft.ops.quantized import Quantized, product
from redraft.ops.torch_arrays import as_tensors
from tests import checkpoints
from tests.models.gguf import files

COLUMNS = 512
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}  # bytes of the float16 numbers


def blocks(kind: str, rows: int, seed: int, size: float = 0.01) -> NDArray[np.uint8]:
    """Random blocks, so every bit pattern occurs, with finite scales."""
    rng = np.random.default_rng(seed)
    numbers, each = gguf.GGML_QUANT_SIZES[Kind[kind]]
    made = rng.integers(0, 256, (rows, COLUMNS // numbers, each), np.uint8)
    for at in HALVES[kind]:
        made[..., at : at + 2] = (rng.normal(0, size, made.shape[:2]).astype(np.float16))[..., None].view(np.uint8)
    if kind == "Q8_0":
        made[..., 2:][made[..., 2:] == 128] = 127
    return made.reshape(rows, -1)


def record(kind: str, rows: int, seed: int = 0, size: float = 0.01) -> Record:
    return Record(Path("x.gguf"), "x", (rows, COLUMNS), Kind[kind], blocks(kind, rows, seed, size))


def decoded(one: Record) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(one.data, one.kind))


def whole(records: list[Record], source: WeightSource | None = None) -> Quantized:
    found = quantized(records, source or WeightSource(("x",)), None)
    assert found is not None
    placed = as_tensors(found)
    assert isinstance(placed, Quantized)
    return placed


@pytest.mark.parametrize("kind", FORMS)
def test_numbers_are_those_of_the_package(kind: str) -> None:
    one = record(kind, 6)
    found = whole([one])
    assert torch.equal(found.dense(), decoded(one))
    assert torch.equal(found.halved().dense(), decoded(one))


@pytest.mark.parametrize("kind", FORMS)
def test_products_are_near_those_of_the_numbers(kind: str) -> None:
    """Rows are rounded to 8 bits, so within a hundredth of the size of the terms."""
    one, x = record(kind, 6), torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ decoded(one).double().T
    assert (product(x, whole([one])) - exact).abs().max() < 0.01 * (x.double().abs() @ decoded(one).double().abs().T).max()


def test_several_tensors_and_the_order_of_their_rows() -> None:
    """Three tensors are one weight; the two halves of each head of the first are stored interleaved; rows may be reordered."""
    parts = [record(kind, rows, i) for i, (kind, rows) in enumerate((("Q5_0", 8), ("Q8_0", 4), ("Q4_0", 4)))]
    q = decoded(parts[0]).view(2, 2, 2, COLUMNS).transpose(1, 2).reshape(8, COLUMNS)
    expected = torch.cat([q, decoded(parts[1]), decoded(parts[2])])
    source = WeightSource(("a", "b", "c"), paired=(2, 0, 0))
    assert torch.equal(whole(parts, source).dense(), expected)
    order = tuple(reversed(range(16)))
    assert torch.equal(whole(parts, WeightSource(("a", "b", "c"), paired=(2, 0, 0), order=order)).dense(), expected.flip(0))


def test_blocks_of_several_kinds_are_one_weight() -> None:
    """Files of kind Q4_K_M store queries and keys as Q4_K, and some values as Q6_K."""
    parts = [record("Q4_K", 8), record("Q4_K", 4, 1), record("Q6_K", 4, 2)]
    found = whole(parts, WeightSource(("a", "b", "c")))
    assert (found.group, found.per, found.wide) == (16, 16, True)
    assert torch.equal(found.dense(), torch.cat([decoded(part) for part in parts]))


@pytest.mark.parametrize("kinds", [(kind,) for kind in FORMS] + [("Q5_0", "Q8_0"), ("Q4_K", "Q6_K")])
def test_bytes_are_known_before_a_weight_is_read(kinds: tuple[str, ...]) -> None:
    parts = [record(kind, 4, i) for i, kind in enumerate(kinds)]
    source = WeightSource(tuple(kinds))
    assert packed_bytes(parts, source) == whole(parts, source).halved().bytes


def test_one_of_several_experts() -> None:
    one = record("Q4_K", 12)
    experts = Record(one.file, one.name, (3, 4, COLUMNS), one.kind, one.data)
    assert torch.equal(whole([experts], WeightSource(("x",), place=(1, 3))).dense(), decoded(one)[4:8])


def test_what_stays_to_be_decoded() -> None:
    """Forms that do not fit together, other types, codes of -128, and scales whose sums are not exact."""
    source = WeightSource(("a", "b"))
    assert quantized([record("Q4_K", 2), record("Q8_0", 2)], source, None) is None
    assert quantized([record("Q4_1", 2), record("Q4_0", 2)], source, None) is None
    one = record("Q8_0", 2)
    one.data[1, 7] = 128
    assert quantized([one], WeightSource(("x",)), None) is None
    assert quantized([record("Q4_0", 2, size=10_000.0)], WeightSource(("x",)), None) is None
    plain = Record(Path("x"), "x", (2, COLUMNS), Kind.F32, np.zeros((2, 4 * COLUMNS), np.uint8))
    assert quantized([plain], WeightSource(("x",)), None) is None


@pytest.mark.skipif(bool(library.why_not()), reason="no native kernels")
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_texts_of_a_file_as_it_is_stored(kind: str, tmp_path: Path) -> None:
    """By default weights stay quantized, and the head gives embeddings; drafts and batches change no text. With none they are decoded."""
    folder = checkpoints.tiny_llama(tmp_path / "own", hidden_size=64, intermediate_size=96)
    path = files.write(folder, tmp_path / "q.gguf", Kind[kind])
    prompts = ["once upon a time", "def f(x):"]

    def texts(**options: str) -> list[list[int]]:
        llm = LLM(str(path), cache_memory=1 << 22, **options)
        stored = [layer.down for layer in llm.runner.weights.layers]
        assert all(getattr(getattr(one, "c", None), "group", 0) == (0 if "quant" in options else 32) for one in stored)
        every = [llm.generate([prompt], temperature=0, max_tokens=24)[0] for prompt in prompts]
        both = llm.generate(prompts, temperature=0, max_tokens=24)
        assert [one.outputs[0].token_ids for one in every] == [one.outputs[0].token_ids for one in both]
        return [one.outputs[0].token_ids for one in both]

    assert texts(draft="copyspec") == texts(draft="none")
    texts(draft="none", quant="none")


def test_a_folder_without_codes_has_nothing_to_keep(tmp_path: Path) -> None:
    folder = checkpoints.tiny_llama(tmp_path / "own", hidden_size=64)
    with pytest.raises(Unsupported, match="quant = 'stored': its matrices are not stored in a quantized form"):
        LLM(str(folder), quant="stored")
