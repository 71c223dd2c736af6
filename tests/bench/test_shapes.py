"""Checkpoints of random weights: every engine can read them, they are the same each time, and memory stays low."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from redraft.bench import shapes
from redraft.errors import InvalidInput
from redraft.models import loader
from tests.arrays import PLACED
from tests.models import tiny

SMALL = {"vocab_size": 4096, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512}
CONFIG = {**shapes.SHAPES["100m"], **SMALL}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path / "cache"))


def written(folder: Path, config: dict[str, object]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_named_shape_is_what_its_name_says(name: str) -> None:
    spec = shapes.spec_of(name)
    weights = sum(torch.Size(shape).numel() for shape in spec.shapes().values())
    assert {"llama-3.2-1b": 1.236e9, "100m": 1.0e8, "qwen2-0.5b": 4.94e8, "smollm2-135m": 1.345e8}[name] == pytest.approx(
        weights, rel=0.005
    )
    assert spec.tied and loader.DTYPES[shapes.SHAPES[name]["dtype"]] == "bfloat16"


@pytest.mark.parametrize(
    "family", ["llama3", "qwen2", "qwen3-biases", "mistral", "mixtral", "phi3", "stablelm", "starcoder2", "gpt2-untied"]
)
def test_every_family_loads_here_and_in_transformers(family: str, tmp_path: Path) -> None:
    prefix, fields = tiny.FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**fields, "vocab_size": 4096}).to_dict()
    config |= {"architectures": [tiny.model(family).__class__.__name__], "dtype": "float32"}
    made = tmp_path / "made"
    made.mkdir()
    shapes.write(made, config)
    spec, weights = tiny.load(made, backend=PLACED)
    other = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    assert torch.equal(other.get_input_embeddings().weight, weights.embed)
    assert weights.final_norm.weight.mean() == pytest.approx(1, abs=0.02)
    assert weights.layers[0].out.weight.std() == pytest.approx(shapes.GAIN / (spec.attention[0].heads * spec.head_dim) ** 0.5, rel=0.1)


def test_a_folder_with_a_config_only_is_written_once(tmp_path: Path) -> None:
    source, reported = written(tmp_path / "mine", CONFIG), []
    made = shapes.checkpoint(str(source), reported.append)
    assert made.parent == tmp_path / "cache" / "shapes" and made.name.startswith("mine-") and reported[-1].endswith("100%")
    before = {file.name: file.stat().st_mtime_ns for file in made.iterdir()}
    assert shapes.checkpoint(str(source / "config.json"), reported.append).name.startswith("config-")
    reported.clear()
    assert shapes.checkpoint(str(source), reported.append) == made and not reported
    assert {file.name: file.stat().st_mtime_ns for file in made.iterdir()} == before
    (source / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 1}))
    assert shapes.checkpoint(str(source)) != made
    assert shapes.checkpoint(str(made)) == made  # a model with weights is not changed


def test_small_files_hold_the_same_numbers_as_one(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "many", "other")]
    for folder, seed, shard in zip(folders, (0, 0, 1), (1 << 30, 2048, 1 << 30), strict=True):
        folder.mkdir()
        shapes.write(folder, CONFIG, seed=seed, shard=shard)
    files = [len(list(folder.glob("*.safetensors"))) for folder in folders]
    assert files[0] == 1 and files[1] > 2
    one, many, other = (tiny.load(folder, backend=PLACED)[1] for folder in folders)
    assert torch.equal(one.embed, many.embed) and torch.equal(one.layers[1].qkv.weight, many.layers[1].qkv.weight)
    assert not torch.equal(one.embed, other.embed)
    assert not torch.equal(one.layers[0].qkv.weight, one.layers[1].qkv.weight)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_save", lambda *given: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        shapes.checkpoint(str(written(tmp_path / "mine", CONFIG)))
    assert not list((tmp_path / "cache" / "shapes").iterdir())


def test_unknown_names_and_small_vocabularies_are_reported(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no shape and no folder 'llama-3.2-1': did you mean 'llama-3.2-1b'"):
        shapes.checkpoint("llama-3.2-1")
    with pytest.raises(InvalidInput, match="vocab_size = 61: the tokenizer for random weights has 4096 tokens"):
        shapes.checkpoint(str(written(tmp_path / "mine", {**CONFIG, "vocab_size": 61})))
    with pytest.raises(InvalidInput, match="dtype = 'int8': allowed are float16, bfloat16, float32, float64"):
        shapes.checkpoint(str(written(tmp_path / "other", {**CONFIG, "dtype": "int8"})))
