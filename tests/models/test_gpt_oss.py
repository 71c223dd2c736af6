"""GPT-OSS from its files: experts in MXFP4 have the numbers of the format, and drafts, batches and policies change no text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from redraft import LLM
from redraft.config import SamplingParams
from redraft.errors import CheckpointError
from redraft.models import loader
from redraft.ops import library
from redraft.ops.arrays import DTYPES
from redraft.ops.backend import Linear
from redraft.ops.cpu import abi
from redraft.ops.quantized import Quantized
from redraft.ops.torch_arrays import as_tensor, dtype_of
from redraft.weights.stored import AsStored
from tests import checkpoints
from tests.arrays import PLACED
from tests.models import tiny

FIELDS = {"hidden_size": 64, "intermediate_size": 96}
PREFIX = "model.layers.0.mlp.experts"
PROMPTS = ["once upon a time", "def f(x):", "a"]


def plain(folder: Path) -> Path:
    return checkpoints.tiny_llama(folder, family="gpt-oss", **FIELDS)


def packed(folder: Path, scales: tuple[int, int] = (120, 127)) -> tuple[Path, dict[str, Tensor]]:
    """With random experts in MXFP4, and all codes and scales by name."""
    file, generator, stored, drawn = plain(folder) / "model.safetensors", torch.Generator().manual_seed(0), {}, {}
    for name, value in load_file(file).items():
        if not name.endswith("_proj"):
            stored[name] = value
            continue
        experts, ins, outs = value.shape
        drawn[f"{name}_blocks"] = torch.randint(256, (experts, outs, ins // 32, 16), dtype=torch.uint8, generator=generator)
        drawn[f"{name}_scales"] = torch.randint(*scales, (experts, outs, ins // 32), dtype=torch.uint8, generator=generator)
    save_file(stored | drawn, file)
    tiny.edit(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder, drawn


def number(code: int) -> float:
    """E2M1: a sign, two bits of an exponent, one of a fraction."""
    sign, exponent, fraction = code >> 3, code >> 1 & 3, code & 1
    return (-1) ** sign * (fraction / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + fraction / 2))


def test_numbers_are_those_of_the_format(tmp_path: Path) -> None:
    folder, drawn = packed(tmp_path / "own", (0, 255))  # all scales
    tensors = loader.inspect(folder, "float32").tensors
    blocks, scales = drawn[f"{PREFIX}.down_proj_blocks"], drawn[f"{PREFIX}.down_proj_scales"]
    found = as_tensor(tensors.read(f"{PREFIX}.down_proj", None, DTYPES["float64"]))
    assert found.shape == tensors.tensors[f"{PREFIX}.down_proj"].shape == (5, 96, 64)
    for expert, i, o in ((0, 0, 0), (1, 33, 5), (4, 95, 63), (2, 64, 7), (3, 31, 2)):
        byte = int(blocks[expert, o, i // 32, i % 32 // 2])
        assert found[expert, i, o] == number(byte >> 4 if i % 2 else byte & 15) * 2.0 ** (int(scales[expert, o, i // 32]) - 127)
    for part in ("gate_up", "down"):
        theirs = convert_moe_packed_tensors(*(drawn[f"{PREFIX}.{part}_proj_{one}"] for one in ("blocks", "scales")), dtype=torch.float32)
        assert torch.equal(as_tensor(tensors.read(f"{PREFIX}.{part}_proj")), theirs)
        assert torch.equal(as_tensor(tensors.read(f"{PREFIX}.{part}_proj", 3)), theirs[3])
        for dtype in (DTYPES["bfloat16"], DTYPES["float16"]):
            read = tensors.read(f"{PREFIX}.{part}_proj", 3, dtype)
            with np.errstate(over="ignore"):
                assert torch.equal(as_tensor(read.astype(dtype)), theirs[3].to(dtype_of(dtype)))


def test_what_stays_packed_has_the_same_numbers(tmp_path: Path) -> None:
    folder, _ = packed(tmp_path / "own")
    decoded, checkpoint = loader.read(loader.inspect(folder, "float32"), PLACED), loader.inspect(folder, "float32", quant=AsStored())
    assert checkpoint.stores_codes()
    kept = loader.read(checkpoint, PLACED, as_stored=True)
    for ours, theirs in zip(kept.layers, decoded.layers, strict=True):
        for mine, other in zip(ours.experts_up + ours.experts_down, theirs.experts_up + theirs.experts_down, strict=True):
            assert isinstance(mine, Quantized) and isinstance(other, Linear) and mine.bias is not None and other.bias is not None
            assert mine.wide and mine.group == 32 and torch.equal(mine.dense(), other.weight) and torch.equal(mine.bias, other.bias)
        assert isinstance(ours.qkv, Linear) and isinstance(ours.router, Linear) and ours.router.bias is not None


def test_scales_beyond_float16_are_decoded(tmp_path: Path) -> None:
    folder, _ = packed(tmp_path / "own", (90, 100))
    checkpoint = loader.inspect(folder, "float32", quant=AsStored())
    assert not checkpoint.stores_codes() and isinstance(loader.read(checkpoint, PLACED, as_stored=True).layers[0].experts_up[0], Linear)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "scales": ("down_proj_scales", None, r"missing tensor .*\.0\.mlp\.experts\.down_proj_scales"),
    "blocks": ("down_proj_blocks", lambda x: x[..., :8].contiguous(), r"down_proj_blocks has shape \[5, 64, 3, 8\], expected .*groups, 16"),
    "shape": ("down_proj_scales", lambda x: x[:, :, :2].contiguous(), r"down_proj_scales has shape \[5, 64, 2\], expected \[5, 64, 3\]"),
    "dtype": ("down_proj_scales", lambda x: x.to(torch.float8_e4m3fn), "down_proj_scales has dtype F8_E4M3, expected U8"),
    "columns": ("down_proj_blocks", lambda x: torch.cat([x, x], 2), r"down_proj_scales has shape \[5, 64, 3\], expected \[5, 64, 6\]"),
    "no number": ("down_proj_scales", lambda x: torch.full_like(x, 255), "down_proj_scales: a scale of 255 is no number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str, tmp_path: Path) -> None:
    part, change, named = REFUSED[case]
    folder, _ = packed(tmp_path / "own")
    stored = load_file(folder / "model.safetensors")
    value = stored.pop(f"{PREFIX}.{part}")
    save_file(stored | ({f"{PREFIX}.{part}": change(value)} if change else {}), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=named) as found:
        loader.read(loader.inspect(folder, "float32"))
    assert "\n" not in str(found.value)


def test_codes_without_their_config_are_refused(tmp_path: Path) -> None:
    folder, _ = packed(tmp_path / "own")
    tiny.edit(folder, quantization_config=None)
    with pytest.raises(CheckpointError, match=rf"missing tensor {PREFIX}\.gate_up_proj"):
        loader.inspect(folder)


def test_sink_logits_stay_wide(tmp_path: Path) -> None:
    """In float32 or better, with the numbers of the file."""
    folder = tiny.saved("gpt-oss", tmp_path / "own", dtype="bfloat16")
    _, weights = tiny.load(folder, backend=PLACED)
    found, stored = weights.layers[1].sink_logits, load_file(folder / "model.safetensors")["model.layers.1.self_attn.sinks"]
    assert found is not None and weights.layers[1].qkv.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert found.dtype == torch.float32 and torch.equal(found, stored.float())


@pytest.mark.skipif(bool(library.why_not()), reason="no native kernels")
@pytest.mark.parametrize("form", ["plain", "decoded", "stored"])
def test_greedy_texts(form: str, tmp_path: Path) -> None:
    """Every backend gives the same, alone, in a batch and with drafts. Only the kernels multiply what is stored, by rows of codes."""
    from redraft.ops.native import Packed

    folder = str(plain(tmp_path / "own") if form == "plain" else packed(tmp_path / "own")[0])
    params, texts = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True), {}
    others = [("torch", "none"), ("reference", "none")] if form != "stored" else []
    for backend, draft in [("native", "none"), ("native", "copyspec"), *others]:
        quant = "stored" if form == "stored" else None
        llm = LLM(folder, backend=backend, quant=quant, draft=draft, cache_memory=1 << 22, dtype="auto", max_model_len=256)
        texts[backend, draft] = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, params)]
        if backend == "native":
            assert isinstance(llm.runner.weights.layers[0].experts_up[0], Packed)
            assert (llm.runner.weights.layers[0].experts_up[0].c.kind == abi.G8) == (form == "stored")
            assert [llm.generate([one], params)[0].outputs[0].token_ids for one in PROMPTS] == texts[backend, draft]
    assert all(one == texts["native", "none"] for one in texts.values())
    assert len({tuple(text) for text in texts["native", "none"]}) == len(PROMPTS)


POLICIES: dict[str, dict[str, str]] = {
    "window": {"keep": "streaming-llm:sinks=2,recent=40"},
    "heavy hitters": {"keep": "scissorhands"},
    "per head": {"keep": "ada-kv"},
    "codes": {"codec": "int8"},
    "encoded pages": {"codec": "int4"},
    "pages": {"read": "page-top-k"},
}


@pytest.mark.skipif(bool(library.why_not()), reason="no native kernels")
@pytest.mark.parametrize("policy", POLICIES)
def test_policies(policy: str, tmp_path: Path) -> None:
    """The kernels and PyTorch give the same text, with and without drafts."""
    folder, prompt = str(plain(tmp_path / "own")), "once upon a time there was a cat. " * 4
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, **POLICIES[policy])  # type: ignore[arg-type]
    texts = []
    for backend, draft in (("native", "none"), ("native", "copyspec"), ("torch", "none")):
        llm = LLM(folder, backend=backend, draft=draft, cache_memory=1 << 23, dtype="float32", max_model_len=256)
        texts.append(llm.generate([prompt], params)[0].outputs[0].token_ids)
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 60


def test_a_config_of_the_hub(tmp_path: Path) -> None:
    """As OpenAI published it, with its scaling in the form of transformers 4."""
    folder = plain(tmp_path / "own")
    raw = json.loads((folder / "config.json").read_text())
    scaling = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn"}
    more = {"experts_per_token": 2, "initial_context_length": 4096, "rope_theta": 150_000, "router_aux_loss_coef": 0.9}
    before = loader.inspect(folder).spec
    tiny.edit(folder, **more, rope_parameters=None, rope_scaling={**scaling, "truncate": False}, max_position_embeddings=131072)
    assert loader.inspect(folder).spec.layers == before.layers and raw["rope_parameters"]["rope_type"] == "yarn"
