"""Shapes of models without a checkpoint: random weights for a config.json, written once into the cache folder.

The speed of an engine depends on the shape of a model and not on its weights, so the engines of a benchmark read the same random
weights from the same files. They are drawn from a fixed seed, so that they are the same everywhere and greedy texts can be compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from redraft import registry
from redraft.core.spec import ModelSpec
from redraft.errors import CheckpointError, InvalidInput, OutOfMemory, did_you_mean, shown
from redraft.models import loader, packages
from redraft.models.checkpoint import FLOAT32
from redraft.models.memory import size
from redraft.ops.arrays import DTYPES, Numbers, name_of

Tick = Callable[[str], None]

BLOCK = 1 << 20  # numbers that are drawn at once
SHARD = 512 << 20  # bytes of a file; writing weights needs about as much memory
SPREAD = 0.02  # standard deviation of embeddings, head, biases and of norms around 1
GAIN = 1.2  # of matrices: sqrt(inputs) times their deviation. At 1 or less greedy texts repeat one token; far above, rounding errors grow
VERSION = 2  # version of the drawing; each version has its own folder
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "100m": {
        **_LLAMA,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 16384,
        "rope_theta": 10000.0,
    },
    "smollm2-135m": {
        **_LLAMA,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
    },
    "qwen2-0.5b": {
        **_LLAMA,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
    },
}


def cache_folder() -> Path:
    """See `kept`."""
    return packages.folder().parent


def config_of(model: str) -> dict[str, Any] | None:
    """The config.json of a shape: a name in SHAPES, a folder without weights or a JSON file. None for a model with weights."""
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model).expanduser()
    if path.is_dir() and any(path.glob("*.safetensors")):
        return None
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and file.is_file():
        raw = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size else None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{file}: not a JSON object")
        return raw
    if path.exists() or "/" in model or model.startswith("embedded"):
        return None  # the loader raises the error
    raise InvalidInput(f"no shape and no folder {model!r}: {did_you_mean(model, [*SHAPES, 'embedded'])}")


def spec_of(model: str) -> ModelSpec:
    """The network of a model or shape. No weight is written or read."""
    config = config_of(model)
    if config is None:
        return loader.inspect(loader.resolve(model)).spec
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return _spec(Path(folder))


def checkpoint(model: str, tick: Tick = lambda what: None) -> Path:
    """The folder with the weights of a model or shape. A shape's weights are written on first use; `tick` receives the progress."""
    config = config_of(model)
    if config is None:
        return loader.resolve(model)
    made = cache_folder() / "shapes" / folder_name(model, config)
    if (made / "config.json").exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{made.name}.", dir=made.parent))
    try:
        write(part, config, tick=tick)
        part.chmod(0o755)
        try:
            part.rename(made)
        except OSError:
            if not (made / "config.json").exists():  # else another run has written the same weights
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return made


def folder_name(model: str, config: dict[str, Any]) -> str:
    """The folder's name, which depends on the config and on how weights are drawn."""
    path = Path(model)
    name = model if model in SHAPES else path.stem if path.suffix == ".json" else path.resolve().name
    key = json.dumps([VERSION, SPREAD, GAIN, config], sort_keys=True).encode()
    return f"{name}-{hashlib.sha256(key).hexdigest()[:10]}"


def write(folder: Path, config: dict[str, Any], *, seed: int = 0, shard: int = SHARD, tick: Tick = lambda what: None) -> None:
    """A checkpoint of random weights in `folder`: safetensors in files of at most `shard` bytes or one tensor, and a tokenizer."""
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    named = name_of(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if named not in DTYPES:
        raise InvalidInput(f"dtype = {shown(named)}: allowed are {', '.join(DTYPES)}")
    spec, dtype = _spec(folder), DTYPES[named]
    _check(folder, spec, dtype)
    for name in TOKENIZER:
        shutil.copyfile(loader.resolve("embedded") / name, folder / name)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    total = sum(math.prod(shape) for shape in spec.shapes().values()) * dtype.itemsize
    written = 0
    files: list[tuple[str, list[str]]] = []
    held: dict[str, Numbers] = {}
    for i, (name, shape, distribution) in enumerate(_stored(spec)):
        tensor = normal(np.random.default_rng((seed, i)), shape, dtype, *distribution)
        if held and sum(one.nbytes for one in held.values()) + tensor.nbytes > shard:
            files.append(_save(folder, held, len(files)))
            held = {}
        held[name] = tensor
        written += tensor.nbytes
        tick(f"writing {size(total)} of random weights, {written / total:.0%}")
    files.append(_save(folder, held, len(files)))
    places = {name: file for file, names in files for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))


def normal(
    generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any] = FLOAT32, mean: float = 0.0, deviation: float = 1.0
) -> Numbers:
    """Numbers of a normal distribution, drawn in float32, block after block, so that little more memory is needed than they take."""
    drawn = np.empty(math.prod(shape), dtype)
    for at in range(0, len(drawn), BLOCK):
        part = generator.standard_normal(min(BLOCK, len(drawn) - at), np.float32)
        drawn[at : at + BLOCK] = mean + deviation * part
    return drawn.reshape(shape)


def _spec(folder: Path) -> ModelSpec:
    config = loader.read_config(folder)
    spec: ModelSpec = registry.load(registry.FAMILIES[config.architectures[0]]).spec(config)
    return spec


def _check(folder: Path, spec: ModelSpec, dtype: np.dtype[Any]) -> None:
    words = json.loads((loader.resolve("embedded") / TOKENIZER[0]).read_text(encoding="utf-8"))["model"]["vocab"]
    if spec.vocab < len(words):
        raise InvalidInput(f"vocab_size = {spec.vocab}: the tokenizer for random weights has {len(words)} tokens")
    needed = sum(math.prod(shape) for shape in spec.shapes().values()) * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutOfMemory(
            f"{folder.parent}: random weights of {size(needed)} do not fit, free {size(free)}; REDRAFT_CACHE names another folder"
        )


def _stored(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...], tuple[float, float]]]:
    """Every tensor of a checkpoint of this network: name, shape as stored, mean and deviation of its numbers."""
    for name, shape in spec.shapes().items():
        source = spec.source(name)
        matrix = name.startswith("layers.") and len(shape) == 2
        distribution = float("norm.weight" in name), GAIN / math.sqrt(shape[-1]) if matrix else SPREAD
        rows = source.rows or (shape[0] // len(source.names),) * len(source.names)
        for part, count in zip(source.names, rows, strict=True):
            stored = (count, *shape[1:])
            yield part, stored[::-1] if source.transposed else stored, distribution


def _save(folder: Path, tensors: dict[str, Numbers], number: int) -> tuple[str, list[str]]:
    file = f"model-{number + 1:05d}.safetensors"
    save_file(tensors, folder / file, {"format": "pt"})
    return file, list(tensors)
