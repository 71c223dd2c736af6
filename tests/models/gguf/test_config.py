"""A GGUF file gives the spec, the weights and the logits of the folder it was made from; what it does not say is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from redraft import registry
from redraft.core.spec import Attention, ModelSpec
from redraft.errors import CheckpointError, RedraftError, Unsupported
from redraft.models import loader
from redraft.models.generation import read_defaults
from redraft.models.runner import Runner
from redraft.ops.backend import Linear
from redraft.ops.torch_arrays import as_tensor
from tests.arrays import PLACED
from tests.models import tiny
from tests.models.gguf import files
from tests.models.test_parity import logits

# without windows, which llama.cpp's converter does not write
CLASSES = ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "GPT2")  # whose GGUF files are read
FAMILIES = [name for name, (kind, _) in tiny.FAMILIES.items() if kind in CLASSES and name not in ("mistral", "qwen2-window")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


def run(path: Path, backend: str = "torch", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    spec, weights = tiny.load(path, str(dtype).removeprefix("torch."), backend=PLACED)
    runner = Runner(spec, weights, registry.load(registry.BACKENDS[backend])(dtype), blocks=4)
    return logits(runner, 45)


def made(folder: Path, name: str, **options: Any) -> tuple[Path, Path]:
    """(folder, GGUF file) of a family of tiny.py."""
    own = folder / name
    if not own.exists():
        tiny.save(name, own, **{"head_dim": 6} if name == "llama3" else {})
    out = folder / f"{name}{len(options)}.gguf"
    return own, files.write(own, out, **options)


def bare(spec: ModelSpec) -> ModelSpec:
    """Without what a file does not say: its family, if llama.cpp has one name for several, and the form of its tensor names."""
    return ModelSpec(**{**spec.__dict__, "family": "", "prefix": ""})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_gives_the_spec_and_logits_of_its_folder(name: str, folder: Path) -> None:
    own, out = made(folder, name)
    first, second = loader.inspect(own), loader.inspect(out)
    assert second.spec.family == {"mistral": "llama"}.get(first.spec.family, first.spec.family)
    if name == "llama3":  # its factors are rounded to float32 in the file
        ours, theirs = (spec.attention[2].rotary.frequencies for spec in (second.spec, first.spec))  # type: ignore[union-attr]
        assert max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)) < 1e-7
        assert (run(own, "reference", torch.float64) - run(out, "reference", torch.float64)).abs().max() < 1e-4
    else:
        assert bare(first.spec) == bare(second.spec)
        assert torch.equal(run(own), run(out))
    assert second.dtype == np.float32


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, "float32"), (Kind.BF16, "bfloat16"), (Kind.Q8_0, "bfloat16")])
def test_the_dtype_is_that_of_the_matrices(kind: Kind, dtype: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    out = files.write(tiny.save("llama2", tmp_path / "own", **sizes), tmp_path / "m.gguf", kind)
    found = loader.inspect(out)  # float16 runs in float32 on a CPU
    assert found.dtype == dtype
    assert loader.read(found).embed.dtype == dtype  # type: ignore[union-attr]


def test_the_parts_of_a_split_set_are_one_model(folder: Path) -> None:
    own, whole = made(folder, "llama2")
    at = folder / "split"
    at.mkdir()
    files.write(own, at / "m.gguf", split=7)
    parts = sorted(at.iterdir())
    assert len(parts) > 3 and parts[0].name == f"m-00001-of-{len(parts):05}.gguf"
    for named in (parts[0], parts[2], at):
        assert loader.resolve(str(named)) == parts[0]
    assert torch.equal(run(parts[0]), run(whole))
    assert len(list(loader.inspect(parts[0]).tensors.files)) == len(parts)
    parts[2].rename(at / "away")
    with pytest.raises(CheckpointError, match=f"missing part {parts[2].name}"):
        loader.inspect(parts[0])
    parts[3].rename(parts[2])
    with pytest.raises(CheckpointError, match=r"split.no = 3: 2 is expected"):
        loader.inspect(parts[0])


def test_a_folder_with_one_model(folder: Path, tmp_path: Path) -> None:
    out = files.write(made(folder, "llama2")[0], tmp_path / "a.gguf")
    assert loader.resolve(str(tmp_path)) == out
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models: name one of them, such as a.gguf"):
        loader.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert loader.resolve(str(tmp_path)) == tmp_path  # an ordinary folder
    with pytest.raises(CheckpointError, match=r"none.gguf: no such file"):
        loader.resolve(str(tmp_path / "none.gguf"))


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_experts_and_biases_are_checked(name: str, folder: Path) -> None:
    lost = {"qwen2": "blk.1.attn_k.bias", "mixtral": "blk.2.ffn_down_exps.weight"}[name]
    with pytest.raises(CheckpointError, match=f"missing tensor {lost}"):
        loader.inspect(made(folder, name, drop=lost)[1])


# what is wrong -> (metadata, the error, what it names)
WRONG: dict[str, tuple[dict[str, Any], type[RedraftError], str]] = {
    "a damaged key": ({"embed\x1bing": 32}, Unsupported, r"metadata 'llama.embed\\x1bing' = 32"),
    "a soft cap": ({"attn_logit_softcapping": 30.0}, Unsupported, r"metadata llama.attn_logit_softcapping = 30.0"),
    "an unknown key": ({"attention__sliding_window": 9}, Unsupported, r"llama.attention.sliding_window = 9"),
    "not causal": ({"attention__causal": False}, Unsupported, r"llama.attention.causal = False"),
    "partial rotation": ({"rope__dimension_count": 4}, Unsupported, r"llama.rope.dimension_count = 4: only 6"),
    "values of another size": ({"attention__value_length": 8}, Unsupported, r"llama.attention.value_length = 8: only 6"),
    "a scaling": ({"rope__scaling__type": "longrope"}, Unsupported, r"llama.rope.scaling.type = 'longrope'; known: none, linear, yarn"),
    "a mix": (
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0, "rope__scaling__yarn_ext_factor": 0.5},
        Unsupported,
        "yarn_ext_factor = 0.5: only 1",
    ),
    "many layers": (
        {"block_count": 1 << 30},
        CheckpointError,
        r"llama.block_count = 1073741824: must be an integer from 1 to 30",
    ),
    "wide heads": ({"attention__key_length": 1 << 23}, CheckpointError, r"4 heads of 8388608, blk.0.attn_q.weight 24 rows"),
    "many experts": ({"expert_count": 1 << 20, "expert_used_count": 2}, CheckpointError, r"do not fit the tensor blk.0.ffn_gate_inp"),
    "a long context": ({"context_length": (1 << 32) - 1}, CheckpointError, r"context_length = 4294967295: must be an integer from 1 to"),
    "a factor": ({"rope__scaling__type": "linear", "rope__scaling__factor": -1.0}, CheckpointError, r"factor = -1.0: must be a positive"),
}


@pytest.mark.parametrize("what", WRONG)
def test_metadata_that_would_change_the_network(what: str, folder: Path) -> None:
    metadata, error, named = WRONG[what]
    own = made(folder, "llama2")[0]
    with pytest.raises(error, match=named):
        loader.inspect(files.write(own, folder / "wrong.gguf", **metadata))


def test_what_is_off_changes_nothing(folder: Path) -> None:
    own, out = made(folder, "llama2")
    off = files.write(own, folder / "off.gguf", attn_logit_softcapping=0.0, logit_scale=0.0, attention__causal=True)
    assert loader.inspect(off).spec == loader.inspect(out).spec


def test_yarn_with_its_own_bounds(folder: Path) -> None:
    own = tiny.save("llama-yarn", folder / "bounds", rope_parameters={**tiny._ROPE, **tiny._YARN, "beta_fast": 8.0, "beta_slow": 2.0})
    out = files.write(own, folder / "bounds.gguf", rope__scaling__yarn_beta_fast=8.0, rope__scaling__yarn_beta_slow=2.0)
    assert bare(loader.inspect(own).spec) == bare(loader.inspect(out).spec)


def test_other_architectures_are_refused_by_name(folder: Path) -> None:
    _, out = made(folder, "llama2")
    damaged = folder / "gemma.gguf"
    damaged.write_bytes(out.read_bytes().replace(b"llama", b"gemma"))
    with pytest.raises(Unsupported, match="unknown architecture 'gemma'; known: llama, qwen2, qwen3, gemma2, gemma3, gpt2"):
        loader.inspect(damaged)


@pytest.mark.parametrize("factors", [[1.0, 2.0], [1.0, 0.0, 2.0], [1.0, float("nan"), 2.0]])
def test_frequencies_need_a_factor_for_each_pair(factors: list[float], folder: Path) -> None:
    extra = [("rope_freqs.weight", np.array(factors, np.float32))]
    out = files.write(made(folder, "llama2")[0], folder / "factors.gguf", extra=extra)
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight needs 3 positive numbers, one for each pair"):
        loader.inspect(out)


def test_queries_and_keys_are_turned_back(folder: Path) -> None:
    """The must-fail control: without it the weights differ."""
    own, out = made(folder, "llama2")
    checkpoint = loader.inspect(out)
    stored = as_tensor(checkpoint.tensors.read("blk.0.attn_q.weight"))
    ours, theirs = (loader.read(one, PLACED).layers[0].qkv for one in (checkpoint, loader.inspect(own)))
    assert isinstance(ours, Linear) and isinstance(theirs, Linear)
    mixer = checkpoint.spec.layers[0].mixer
    assert isinstance(mixer, Attention)
    assert torch.equal(ours.weight, theirs.weight) and not torch.equal(ours.weight[: len(stored)], stored)


def test_default_sampling_parameters(tmp_path: Path) -> None:
    def written(name: str, **fields: Any) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        for key, value in fields.items():
            (writer.add_float32 if isinstance(value, float) else writer.add_int32)(f"general.sampling.{key}", value)
        files.close(writer)
        return tmp_path / name

    every = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "penalty_repeat": 1.1}
    found = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.1}
    same = {"mirostat": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.2, "xtc_probability": 0.5, "xtc_threshold": 0.15}
    every, found = every | same, found | same
    assert read_defaults(written("a.gguf", **every), (2,), 61) == found
    assert read_defaults(written("b.gguf"), (2,), 61) == {}
    with pytest.raises(CheckpointError, match=r"c.gguf: SamplingParams.mirostat = 1"):
        read_defaults(written("c.gguf", mirostat=1), (2,), 61)
    with pytest.raises(CheckpointError, match=r"d.gguf: SamplingParams.top_p = 2.0"):
        read_defaults(written("d.gguf", top_p=2.0), (2,), 61)


GEMMA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # other fields of the folder, metadata of the file
    "gemma2": ({"query_pre_attn_scalar": 8}, {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ({"query_pre_attn_scalar": 8, "layer_types": None, "num_hidden_layers": 7}, {"rope__freq_base_swa": 100.0}),
}


@pytest.mark.parametrize("name", GEMMA)
def test_gemma(name: str, folder: Path) -> None:
    """Windows by layer, the scale of scores and the gains of norms follow from the architecture."""
    changes, metadata = GEMMA[name]
    own = tiny.save(name, folder / f"{name}-whole", **changes)
    out = files.write(own, folder / f"{name}.gguf", attention__sliding_window=11, **metadata)
    first, second = run(own, "reference", torch.float64), run(out, "reference", torch.float64)
    assert (first - second).abs().max() < 1e-5 * first.abs().max()  # the gains are rounded to float32 in the file
    windows = [[mixer.window for mixer in loader.inspect(path).spec.attention] for path in (own, out)]
    assert windows[0] == windows[1] and {11, None} == set(windows[0])
