"""Folders with quantized matrices: the numbers are those of the format's formula, and drafts and batches change no text."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from redraft import LLM
from redraft.errors import CheckpointError, RedraftError, Unsupported
from redraft.models import loader
from redraft.models.checkpoint import Safetensors
from redraft.ops import library
from redraft.ops.quantized import Quantized
from redraft.ops.torch_arrays import as_tensor
from redraft.weights.stored import AsStored
from tests import checkpoints
from tests.arrays import PLACED

GROUP = 32
Write = Callable[[str, Tensor, np.random.Generator], tuple[dict[str, Tensor], Tensor]]  # -> what is stored, and the numbers that it means


def words(numbers: NDArray[np.integer[Any]]) -> Tensor:
    """[..., 8] of 4 bits -> int32 [...], the first in the lowest bits. In Python's integers, one by one."""
    flat = numbers.reshape(-1, 8).tolist()
    found = np.array([sum(int(one) << 4 * i for i, one in enumerate(eight)) for eight in flat], np.uint64).astype(np.uint32)
    return torch.from_numpy(found.view(np.int32).reshape(numbers.shape[:-1]).copy())


def drawn(weight: Tensor, rng: np.random.Generator, zero: int | None) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Codes [outs, ins], zeros and float16 scales [outs, groups]."""
    outs, ins = weight.shape
    zeros = np.full((outs, ins // GROUP), 8) if zero == 8 else rng.integers(1, 16, (outs, ins // GROUP))
    return rng.integers(0, 16, (outs, ins)), zeros, rng.normal(0, 0.03, (outs, ins // GROUP)).astype(np.float16)


def meant(codes: Any, zeros: Any, scales: Any) -> Tensor:
    spread = [np.repeat(one.astype(np.float64), GROUP, 1) for one in (zeros, scales)]
    return torch.from_numpy((codes - spread[0]) * spread[1]).float()


def gptq(plus: int, zero: int | None, shuffled: bool = False) -> Write:
    def write(name: str, weight: Tensor, rng: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes, zeros, scales = drawn(weight, rng, zero)
        outs, ins = weight.shape
        of = np.arange(ins) // GROUP
        dense = meant(codes, zeros, scales)
        if shuffled:
            of = rng.permutation(of)
            dense = torch.from_numpy((codes - zeros[:, of].astype(np.float64)) * scales.astype(np.float64)[:, of]).float()
        stored = {
            "qweight": words(codes.T.reshape(ins // 8, 8, outs).swapaxes(1, 2)),
            "qzeros": words((zeros.T - plus).reshape(ins // GROUP, outs // 8, 8)),
            "scales": torch.from_numpy(scales.T.copy()),
            "g_idx": torch.from_numpy(of.astype(np.int32)),
        }
        return {f"{name}.{part}": tensor for part, tensor in stored.items()}, dense

    return write


def awq(name: str, weight: Tensor, rng: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros, scales = drawn(weight, rng, None)
    outs, ins = weight.shape
    place = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight outputs lies in each place of a word
    stored = {
        "qweight": words(codes.T.reshape(ins, outs // 8, 8)[..., place]),
        "qzeros": words(zeros.T.reshape(ins // GROUP, outs // 8, 8)[..., place]),
        "scales": torch.from_numpy(scales.T.copy()),
    }
    return {f"{name}.{part}": tensor for part, tensor in stored.items()}, meant(codes, zeros, scales)


def packed(asymmetric: bool, dtype: torch.dtype = torch.float16) -> Write:
    def write(name: str, weight: Tensor, rng: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
        codes, zeros, scales = drawn(weight, rng, None if asymmetric else 8)
        scale = torch.from_numpy(scales).to(dtype)
        outs, ins = weight.shape
        stored = {
            "weight_packed": words(codes.reshape(outs, ins // 8, 8)),
            "weight_scale": scale,
            "weight_shape": torch.tensor([outs, ins]),
        }
        if asymmetric:
            stored["weight_zero_point"] = words(zeros.reshape(outs // 8, 8, -1).swapaxes(1, 2))
        dense = meant(codes, zeros, scale.float().numpy())
        return {f"{name}.{part}": tensor for part, tensor in stored.items()}, dense

    return write


def bytes_of_outputs(name: str, weight: Tensor, rng: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
    codes = torch.from_numpy(rng.integers(-127, 128, tuple(weight.shape)).astype(np.int8))
    scale = torch.from_numpy(rng.uniform(1e-3, 4e-3, (len(weight), 1)).astype(np.float32))
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}, codes.float() * scale


def floats_of_outputs(name: str, weight: Tensor, rng: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale = weight.to(torch.float8_e4m3fn), torch.from_numpy(rng.uniform(0.5, 2, (len(weight), 1)).astype(np.float32))
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}, codes.float() * scale


def blocks(name: str, weight: Tensor, rng: np.random.Generator) -> tuple[dict[str, Tensor], Tensor]:
    codes, (outs, ins) = weight.to(torch.float8_e4m3fn), weight.shape
    scale = torch.from_numpy(rng.uniform(0.5, 2, (-(-outs // 24), -(-ins // 40))).astype(np.float32))
    dense = codes.float()
    for i in range(outs):
        for j in range(ins):
            dense[i, j] *= scale[i // 24, j // 40]
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}, dense


def way(**weights: Any) -> dict[str, Any]:
    kind = {(4, "int"): "pack-quantized", (8, "int"): "int-quantized", (8, "float"): "float-quantized"}[
        weights["num_bits"], weights["type"]
    ]
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups, "ignore": ["lm_head"]}


FOUR = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
FORMATS: dict[str, tuple[dict[str, Any], Write, bool]] = {  # quantization_config, writer, whether it stays packed
    "gptq": (GPTQ, gptq(1, 8), True),
    "gptq-zeros": (GPTQ, gptq(1, None), True),
    "gptq-v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, gptq(0, None), True),
    "gptq-act-order": ({**GPTQ, "desc_act": True}, gptq(1, None, True), False),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, awq, True),
    "compressed-4": (way(**FOUR), packed(False), True),
    "compressed-4-zeros": (way(**FOUR), packed(True), True),
    "compressed-4-bfloat16": (way(**FOUR), packed(False, torch.bfloat16), True),
    "compressed-8": (way(num_bits=8, type="int", strategy="channel"), bytes_of_outputs, True),
    "compressed-fp8": (way(num_bits=8, type="float", strategy="channel"), floats_of_outputs, False),
    "fp8": ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [24, 40]}, blocks, False),
}


def written(name: str, folder: Path, skipped: tuple[int, ...] = ()) -> tuple[Path, dict[str, Tensor]]:
    """A tiny Llama whose matrices of layers, but for the skipped ones, are stored so, and all its numbers by name."""
    own = checkpoints.tiny_llama(folder, hidden_size=64, intermediate_size=96)
    file = own / "model.safetensors"
    fields, write, _ = FORMATS[name]
    rng, stored, plain = np.random.default_rng(0), {}, {}
    for key, value in load_file(file).items():
        if value.ndim == 2 and ".layers." in key and int(key.split(".")[2]) not in skipped:
            some, plain[key] = write(key.removesuffix(".weight"), value.float(), rng)
            stored |= some
        else:
            stored[key] = plain[key] = value
    save_file({key: value.contiguous() for key, value in stored.items()}, file)
    raw = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**raw, "quantization_config": fields}))
    return own, plain


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_those_of_the_formula(name: str, tmp_path: Path) -> None:
    folder, plain = written(name, tmp_path / name)
    checkpoint = loader.inspect(folder, "float32")
    for key, value in plain.items():
        assert torch.equal(as_tensor(checkpoint.tensors.read(key)).float(), value.float()), key
    weights = loader.read(checkpoint, PLACED)
    parts = [plain[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(weights.layers[1].qkv.weight, torch.cat(parts))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", FORMATS)
def test_what_stays_packed_has_the_same_numbers(name: str, tmp_path: Path) -> None:
    folder, plain = written(name, tmp_path / name)
    checkpoint = loader.inspect(folder, quant=AsStored())
    weights = loader.read(checkpoint, PLACED, as_stored=True)
    qkv, down = weights.layers[1].qkv, weights.layers[1].down
    assert isinstance(qkv, Quantized) == isinstance(down, Quantized) == FORMATS[name][2]
    if isinstance(qkv, Quantized):
        parts = [plain[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
        assert torch.equal(qkv.dense(), torch.cat(parts))


@pytest.mark.skipif(bool(library.why_not()), reason="no native kernels")
@pytest.mark.parametrize("name", ["gptq-zeros", "awq", "compressed-8", "fp8"])
def test_drafts_and_batches_change_no_text(name: str, tmp_path: Path) -> None:
    folder, _ = written(name, tmp_path / name)
    prompts = ["once upon a time", "def f(x):"]

    def texts(draft: str) -> list[list[int]]:
        llm = LLM(str(folder), cache_memory=1 << 22, draft=draft, quant="stored" if FORMATS[name][2] else None)
        every = [llm.generate([prompt], temperature=0, max_tokens=24)[0].outputs[0].token_ids for prompt in prompts]
        assert every == [one.outputs[0].token_ids for one in llm.generate(prompts, temperature=0, max_tokens=24)]
        return every

    assert texts("copyspec") == texts("none")


@pytest.mark.skipif(bool(library.why_not()), reason="no native kernels")
@pytest.mark.parametrize("plain", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_layers_that_are_not_quantized(plain: tuple[int, ...], tmp_path: Path) -> None:
    """Quantizers may leave out some layers, often the first and the last. The others stay packed by default."""
    folder, dense = written("gptq", tmp_path / "own", skipped=plain)
    llm = LLM(str(folder), cache_memory=1 << 22, draft="none")
    found = [getattr(layer.down, "c").group for layer in llm.runner.weights.layers]  # noqa: B009
    assert found == [0 if i in plain else GROUP for i in range(3)]
    decoded = loader.read(loader.inspect(folder, "float32"), PLACED).layers
    assert all(torch.equal(decoded[i].down.weight, dense[f"model.layers.{i}.mlp.down_proj.weight"]) for i in range(3))  # type: ignore[union-attr]
    texts = [
        [one.outputs[0].token_ids for one in llm.generate(["a", "def f(x):"], max_tokens=24, draft=draft)] for draft in ("none", "copyspec")
    ]
    assert texts[0] == texts[1]


REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "bits": ("gptq", {**GPTQ, "bits": 3}, Unsupported, "config.json: quantization_config.bits = 3: only 4"),
    "group": ("gptq", {**GPTQ, "group_size": 0}, CheckpointError, "quantization_config.group_size = 0: must be -1 or a positive integer"),
    "columns": ("gptq", {**GPTQ, "group_size": 40}, CheckpointError, "groups of 40 do not fill 64 columns"),
    "shape": ("gptq", {**GPTQ, "group_size": 64}, CheckpointError, r"qzeros has shape \[2, \d+\], expected \[1, \d+\]"),
    "version": ("awq", {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemv"}, Unsupported, "version = 'gemv'"),
    "method": ("gptq", {"quant_method": "hqq"}, Unsupported, "weights quantized by 'hqq' are not read; known: awq, compressed-tensors"),
    "format": ("compressed-8", {**way(**FOUR), "format": "marlin-24"}, Unsupported, "quantization_config.format = 'marlin-24'"),
    "way": ("compressed-8", way(num_bits=8, type="int", strategy="group"), Unsupported, "weights of 8 bits, type int, strategy group"),
    "block": ("fp8", {"quant_method": "fp8", "weight_block_size": None}, CheckpointError, "weight_block_size = None: two positive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, tmp_path: Path) -> None:
    name, fields, error, named = REFUSED[case]
    folder, _ = written(name, tmp_path / name)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": fields}))
    with pytest.raises(error, match=named) as found:
        loader.read(loader.inspect(folder, "float32"))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-4", "fp8"])
def test_a_missing_part_is_named(name: str, tmp_path: Path) -> None:
    folder, _ = written(name, tmp_path / name)
    part = {"gptq": "scales", "awq": "qzeros", "compressed-4": "weight_scale", "fp8": "weight_scale_inv"}[name]
    stored = load_file(folder / "model.safetensors")
    del stored[f"model.layers.0.mlp.up_proj.{part}"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"missing tensor model\.layers\.0\.mlp\.up_proj\.{part}"):
        loader.read(loader.inspect(folder, "float32"))


def test_a_plain_folder_has_none(tmp_path: Path) -> None:
    folder = checkpoints.tiny_llama(tmp_path / "own", hidden_size=64, intermediate_size=96)
    checkpoint = loader.inspect(folder)
    assert (
        isinstance(checkpoint.tensors, Safetensors) and checkpoint.tensors.packed(checkpoint.sources["layers.0.qkv.weight"], None) is None
    )


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.lists(st.integers(-3, 300), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    st.sampled_from(["gptq", "awq", "fp8", "mxfp4", "compressed-tensors", "int-quantized", "pack-quantized", "group", "channel"]),
    st.sampled_from([4, 8, 128, -1]),
)  # fmt: skip


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all fields."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, own in inner for path in ((*at, key), *_places(own, (*at, key)))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stored")
    return {name: written(name, root / name)[0] for name in FORMATS}


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_field_or_tensor_is_read_or_refused_in_one_line(name: str, folders: dict[str, Path], data: st.DataObject) -> None:
    """A field of quantization_config with another value or none, or a tensor of another shape, dtype or none."""
    raw = json.loads((folders[name] / "config.json").read_text())
    tensors = load_file(folders[name] / "model.safetensors")
    if data.draw(st.booleans(), label="field"):
        *path, last = data.draw(st.sampled_from(_places(raw["quantization_config"])), label="place")
        holder = raw["quantization_config"]
        for key in path:
            holder = holder[key]
        if data.draw(st.booleans(), label="removed") and isinstance(holder, dict):
            del holder[last]
        else:
            holder[last] = data.draw(VALUES, label="value")
    else:
        key = data.draw(st.sampled_from(sorted(key for key in tensors if "layers.0" in key)), label="tensor")
        change = data.draw(st.sampled_from(["gone", "shorter", "flat", "int32", "float32", "empty"]), label="change")
        found = tensors.pop(key)
        changed = {
            "shorter": lambda: found[: len(found) // 2],
            "flat": lambda: found.flatten(),
            "int32": lambda: found.to(torch.int32),
            "float32": lambda: found.float(),
            "empty": lambda: found[:0],
        }
        if change != "gone":
            tensors[key] = changed[change]().contiguous()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "config.json").write_text(json.dumps(raw))
        save_file(tensors, folder / "model.safetensors")
        try:
            loader.read(loader.inspect(folder, quant=AsStored()), as_stored=True)
            loader.read(loader.inspect(folder))
        except RedraftError as error:
            said = str(error)
        else:
            said = ""
    assert "\n" not in said and len(said) < 400
