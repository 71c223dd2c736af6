"""A checkpoint folder -> ModelSpec and Weights. Reads JSON and safetensors only: nothing from a checkpoint is executed."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.spec import Experts, Mlp, ModelSpec, Source
from redraft.errors import CheckpointError, InvalidInput, Unsupported
from redraft.ops.backend import LayerWeights, Linear, LinearWeights, NormWeights, Weights
from redraft.ops.quantized import Quantized

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from redraft.weights.quant import Quantizer

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

_EMBEDDED = {"embedded": "target", "embedded-draft": "draft"}

Pack = Callable[[LinearWeights, bool], LinearWeights]  # Backend.pack

_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DOWNLOADED = ["model*.safetensors", _INDEX, "*.json", "*.jinja", "tokenizer*", "*.txt", "*.model"]
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)attn\.(bias|masked_bias)$")  # buffers that old versions saved
_LINEAR = re.compile(r"(?P<base>(?P<layer>layers\.\d+)\.(?:experts\.\d+\.)?(?P<part>qkv|out|up|down|router))\.weight|head")
_BEHIND = {"qkv": "attn_norm", "up": "mlp_norm"}  # whose inputs a norm makes
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class Entry(NamedTuple):
    """One tensor of a checkpoint, as its file's header tells it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """What headers and JSON files tell, before anything large is read.

    weight_bytes: of all weights in `dtype`, at most where `quant` stores them otherwise; eos_ids: the tokens that end a text;
    defaults: fields of SamplingParams that generation_config.json sets; sources: canonical name -> where it lies;
    entries: the tensors of the files.
    """

    path: Path
    spec: ModelSpec
    dtype: torch.dtype
    weight_bytes: int
    eos_ids: tuple[int, ...]
    defaults: dict[str, Any]
    sources: dict[str, Source] = field(repr=False)
    entries: dict[str, Entry] = field(repr=False)
    quant: Quantizer | None = None

    @property
    def context(self) -> int:
        return self.spec.context


def resolve(model: str) -> Path:
    """The folder of 'embedded' or 'embedded-draft', of a path, or of a hub id (`org/name` or `org/name@revision`, downloaded unless cached;
    HF_HOME and HF_HUB_OFFLINE are honoured). CheckpointError when it is none of these."""
    if model in _EMBEDDED:
        return Path(__file__).parent.parent / "embedded" / _EMBEDDED[model]
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        raise Unsupported(f"{model}: GGUF files are not read; use a folder with safetensors weights")
    if path.exists():
        raise CheckpointError(f"{model}: is a file; a model is the folder with config.json and safetensors weights")
    hub = _HUB_ID.fullmatch(model)
    if hub is None:
        raise CheckpointError(f"{model}: no such folder, and not a hub id (org/name or org/name@revision)")
    from huggingface_hub import snapshot_download

    try:
        # top-level files only: repositories also keep originals and exports of other runtimes in folders
        found = snapshot_download(hub["repo"], revision=hub["revision"], allow_patterns=_DOWNLOADED, ignore_patterns=["*/*"])
    except Exception as error:  # the hub's client lets errors of three libraries through
        raise CheckpointError(f"{model}: no such folder, and not to be had from the hub: {_first_line(error)}") from None
    return Path(found)


def read_config(path: Path) -> PretrainedConfig:
    """config.json with its family's defaults filled in. CheckpointError or Unsupported names what is wrong with it."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    file = path / "config.json"
    if not file.exists():
        if (path / "adapter_config.json").exists():
            raise Unsupported(f"{path}: a LoRA/PEFT adapter (adapter_config.json); merge it into its base model first")
        if any(path.glob("*.gguf")):
            raise Unsupported(f"{path}: holds GGUF weights, which are not read; use a folder with safetensors weights")
        raise CheckpointError(f"{path}: no config.json")
    raw = _json(file)
    quantized = raw.get("quantization_config") or raw.get("compression_config")
    if quantized:
        method = quantized.get("quant_method", "bitsandbytes") if isinstance(quantized, dict) else quantized
        raise Unsupported(f"{path}: weights quantized by {method!r} are not read")
    if _architecture(raw.get("architectures")) not in registry.FAMILIES:
        raise Unsupported(f"{file}: unknown architecture {raw.get('architectures')!r}; known: {', '.join(registry.FAMILIES)}")
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a family's own checks raise
        raise CheckpointError(f"{file}: {_first_line(error)}") from None
    return config


def _architecture(names: Any) -> str:
    return str(names[0]) if isinstance(names, list) and names else ""


def inspect(path: Path, dtype: str = "auto", device: torch.device | str = "cpu", quant: Quantizer | None = None) -> Checkpoint:
    """Checks the whole checkpoint by its headers: every weight there, of the right shape, nothing left over.

    dtype 'auto' is the checkpoint's own, except that float16 becomes float32 on the CPU, which has no fast float16 and
    would overflow where it matters. quant: how linear weights are stored, see `read`. Raises CheckpointError or Unsupported, one
    line each.
    """
    config = read_config(path)
    if config.num_hidden_layers < 1:
        raise CheckpointError(f"{path / 'config.json'}: {config.num_hidden_layers} layers")
    try:
        spec: ModelSpec = registry.load(registry.FAMILIES[_architecture(config.architectures)])(config)
    except (CheckpointError, Unsupported) as error:
        raise type(error)(f"{path / 'config.json'}: {error}") from None
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:  # a field missing or out of all range
        raise CheckpointError(f"{path / 'config.json'}: {_first_line(error)}") from None
    if config.model_type != spec.family:
        raise CheckpointError(f"{path / 'config.json'}: model_type {config.model_type!r} is not that of {config.architectures}")
    entries = _entries(path)
    sources = {name: _check(path, entries, name, spec.source(name), shape) for name, shape in spec.shapes().items()}
    _check_nothing_left(path, spec, sources, entries)
    chosen = _dtype(config, dtype, torch.device(device), entries[sources["embed"].names[0]])
    eos_ids, defaults = _generation(path, config)
    return Checkpoint(path, spec, chosen, _bytes(spec, chosen, quant), eos_ids, defaults, sources, entries, quant)


def _bytes(spec: ModelSpec, dtype: torch.dtype, quant: Quantizer | None) -> int:
    size = 0
    for name, shape in spec.shapes().items():
        linear = _LINEAR.fullmatch(name)
        if quant is None or linear is None or linear["part"] == "router":
            size += math.prod(shape) * dtype.itemsize
        else:
            size += quant.bytes(shape[0], shape[1], dtype, "layer" if linear["part"] else "head")
    if quant is not None and spec.tied:
        head = quant.bytes(spec.vocab, spec.hidden, dtype, "head")
        size += head if head < spec.vocab * spec.hidden * dtype.itemsize else 0  # else it is the embedding
    return size


def load(path: Path, device: torch.device | str = "cpu", dtype: str = "auto") -> tuple[ModelSpec, Weights]:
    """Inspects and reads a checkpoint. Memory is not checked here: see memory.pool_slabs."""
    checkpoint = inspect(path, dtype, device)
    return checkpoint.spec, read(checkpoint, device)


def read(checkpoint: Checkpoint, device: torch.device | str = "cpu", pack: Pack = lambda weights, gated: weights) -> Weights:
    """The weights of an inspected checkpoint, in its `dtype`. Each is filled in place from the mapped files. The checkpoint's `quant`
    and then `pack` (Backend.pack) give a linear weight its final form before the next one is read, so that at no time more than
    one weight is held twice."""
    tensors: dict[str, Tensor] = {}
    linears: dict[str, LinearWeights] = {}
    files = {file: _open(file) for file in sorted({entry.file for entry in checkpoint.entries.values()})}
    shapes = checkpoint.spec.shapes()

    def filled(name: str) -> Tensor:
        out = torch.empty(shapes[name], dtype=checkpoint.dtype, device=device)
        source = checkpoint.sources[name]
        for part, target in _parts(source, out):
            entry = checkpoint.entries[part]
            try:
                stored: Tensor = files[entry.file].get_slice(part)[source.place[0]] if source.place else files[entry.file].get_tensor(part)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{entry.file}: {part}: {_first_line(error)}") from None
            target.copy_(stored.T if source.transposed else stored)
        return out

    # biases and norms come first: what a matrix is packed with is there when it is read
    for name in _progress(checkpoint, {name: shapes[name] for name in sorted(shapes, key=lambda name: len(shapes[name]) > 1)}):
        if linear := _LINEAR.fullmatch(name):
            base = linear["base"] or name
            stored = _stored(checkpoint, linear, Linear(filled(name), tensors.get(f"{base}.bias")), tensors)
            linears[base] = pack(stored, linear["part"] == "up" and _gated(checkpoint.spec, linear))
            del stored
        else:
            tensors[name] = filled(name)
    if checkpoint.spec.tied and "lm_head.weight" in checkpoint.entries:
        head = files[checkpoint.entries["lm_head.weight"].file].get_tensor("lm_head.weight")
        if not torch.equal(head.to(tensors["embed"]), tensors["embed"]):
            raise CheckpointError(f"{checkpoint.path}: lm_head.weight differs from the embedding, yet tie_word_embeddings is true")
    if checkpoint.spec.tied:
        stored = _stored(checkpoint, None, Linear(tensors["embed"]), tensors)
        linears["head"] = head = pack(stored, False)
        if isinstance(stored, Linear) and not isinstance(head, Linear):  # the same numbers: they are not held twice
            del tensors["embed"], stored
    return _assemble(checkpoint.spec, tensors, linears)


def _gated(spec: ModelSpec, linear: re.Match[str]) -> bool:
    mlp = spec.layers[int(linear["layer"].removeprefix("layers."))].mlp
    return mlp.mlp.gated if isinstance(mlp, Experts) else mlp.gated


def _stored(checkpoint: Checkpoint, linear: re.Match[str] | None, weights: Linear, tensors: dict[str, Tensor]) -> LinearWeights:
    """As the checkpoint's `quant` stores it. linear: the match of its name; None: the tied head."""
    part = linear["part"] if linear else None
    if checkpoint.quant is None or part == "router":
        return weights
    norm = f"{linear['layer']}.{_BEHIND[part]}" if linear and part in _BEHIND else None if part else "final_norm"
    gains = None
    if norm is not None:
        gains = tensors[f"{norm}.weight"].abs()
        if (shift := tensors.get(f"{norm}.bias")) is not None:
            gains = gains + shift.abs()
    try:
        return checkpoint.quant.quantize(weights, "layer" if part else "head", gains)
    except Unsupported as error:
        raise Unsupported(f"{checkpoint.path}: {linear[0] if linear else 'head'}: {error}") from None


def hollow(checkpoint: Checkpoint) -> Weights:
    """The weights as shapes on the meta device, without reading a number: for a Runner that is only looked at."""
    shapes = checkpoint.spec.shapes().items()
    tensors = {name: torch.empty(shape, dtype=checkpoint.dtype, device="meta") for name, shape in shapes}
    linears: dict[str, LinearWeights] = {"head": Linear(tensors["embed"])}
    for name, tensor in tensors.items():
        if linear := _LINEAR.fullmatch(name):
            base = linear["base"] or name
            linears[base] = Linear(tensor, tensors.get(f"{base}.bias"))
    return _assemble(checkpoint.spec, tensors, linears)


def _assemble(spec: ModelSpec, tensors: dict[str, Tensor], linears: dict[str, LinearWeights]) -> Weights:
    """Where there is no `embed`, the head is tied to it and holds its numbers."""

    def norm(name: str) -> NormWeights | None:
        return NormWeights(tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) if f"{name}.weight" in tensors else None

    def layer(at: str, mlp: Mlp | Experts) -> LayerWeights:
        experts = [f"{at}.experts.{e}" for e in range(mlp.count)] if isinstance(mlp, Experts) else []
        attn_norm, mlp_norm, router = norm(f"{at}.attn_norm"), norm(f"{at}.mlp_norm"), linears.get(f"{at}.router")
        assert attn_norm and mlp_norm and not isinstance(router, Quantized)
        return LayerWeights(
            attn_norm=attn_norm,
            qkv=linears[f"{at}.qkv"],
            out=linears[f"{at}.out"],
            mlp_norm=mlp_norm,
            q_norm=norm(f"{at}.q_norm"),
            k_norm=norm(f"{at}.k_norm"),
            up=linears.get(f"{at}.up"),
            down=linears.get(f"{at}.down"),
            router=router,
            experts_up=tuple(linears[f"{one}.up"] for one in experts),
            experts_down=tuple(linears[f"{one}.down"] for one in experts),
        )

    final = norm("final_norm")
    assert final
    return Weights(
        embed=tensors["embed"] if "embed" in tensors else linears["head"],
        head=linears["head"],
        final_norm=final,
        layers=tuple(layer(f"layers.{i}", own.mlp) for i, own in enumerate(spec.layers)),
        positions=tensors.get("positions"),
    )


def _parts(source: Source, out: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each stored tensor of a weight, and the view of the weight that it fills."""
    rows = source.rows or [len(out) // len(source.names)] * len(source.names)
    yield from zip(source.names, out.split(list(rows)), strict=True)


def _entries(path: Path) -> dict[str, Entry]:
    """Every tensor of the safetensors files: model.safetensors, or the shards that the index names."""
    if (path / _SINGLE).exists():
        files = [path / _SINGLE]
    elif (path / _INDEX).exists():
        index = _json(path / _INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise CheckpointError(f"{path / _INDEX}: no weight_map of tensor and file names")
        files = [path / name for name in sorted(set(index.values()))]
        for file in files:
            if file.parent != path:
                raise CheckpointError(f"{path / _INDEX}: names a file outside of the folder: {file.name}")
            if not file.exists():
                raise CheckpointError(f"{path}: missing shard {file.name}, named in {_INDEX}")
    else:
        raise _no_weights(path)
    entries = {}
    for file in files:
        opened = _open(file)
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            part = opened.get_slice(name)
            entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())
    return entries


def _no_weights(path: Path) -> CheckpointError | Unsupported:
    if (path / "adapter_config.json").exists():
        return Unsupported(f"{path}: a LoRA/PEFT adapter (adapter_config.json); merge it into its base model first")
    for file in sorted(path.iterdir()):
        if file.suffix == ".gguf":
            return Unsupported(f"{path}: holds GGUF weights ({file.name}), which are not read; use safetensors weights")
        if file.suffix in _PICKLED:
            return Unsupported(f"{path}: holds pickled weights only ({file.name}), which could run code; convert them to safetensors")
    return CheckpointError(f"{path}: no weights: neither {_SINGLE} nor {_INDEX}")


def _check(path: Path, entries: dict[str, Entry], name: str, source: Source, shape: tuple[int, ...]) -> Source:
    """The source, or its alternative, with every part in the files, of the right shape and a dtype that is read."""
    while source.names[0] not in entries and source.otherwise and source.otherwise.names[0] in entries:
        source = source.otherwise
    for part, target in _parts(source, torch.empty(shape, device="meta")):
        if part not in entries:
            why = " (tie_word_embeddings is false)" if name == "head" else ""
            where = _SINGLE if (path / _SINGLE).exists() else _INDEX
            raise CheckpointError(f"{path / where}: missing tensor {part}{why}")
        entry = entries[part]
        expected = tuple(target.T.shape) if source.transposed else tuple(target.shape)
        if source.place:
            expected = source.place[1], *expected
        if entry.shape != expected:
            raise CheckpointError(f"{entry.file}: {part} has shape {list(entry.shape)}, expected {list(expected)} from config.json")
        if entry.dtype not in _STORED:
            raise Unsupported(f"{entry.file}: {part} has dtype {entry.dtype}; known: {', '.join(_STORED)}")
    return source


def _check_nothing_left(path: Path, spec: ModelSpec, sources: dict[str, Source], entries: dict[str, Entry]) -> None:
    left = set(entries).difference(*(source.names for source in sources.values()))
    left = {name for name in left if not _HARMLESS.search(name) and not (spec.tied and name == "lm_head.weight")}
    if left:
        first = min(left)
        raise CheckpointError(f"{entries[first].file}: {len(left)} tensors that a {spec.family} model lacks, the first is {first}")


def _dtype(config: PretrainedConfig, asked: str, device: torch.device, embed: Entry) -> torch.dtype:
    if asked != "auto":
        if asked not in DTYPES:
            raise InvalidInput(f"dtype = {asked!r}: allowed are auto, {', '.join(DTYPES)}")
        return DTYPES[asked]
    own = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if own not in DTYPES.values():
        own = _STORED[embed.dtype]
    assert isinstance(own, torch.dtype)
    return torch.float32 if own == torch.float16 and device.type == "cpu" else own


def _generation(path: Path, config: PretrainedConfig) -> tuple[tuple[int, ...], dict[str, Any]]:
    """End-of-text ids, and the SamplingParams fields that generation_config.json sets. Its length limits are left out:
    they are defaults of a library, not of a model."""
    file = path / "generation_config.json"
    raw = _json(file) if file.exists() else {}
    fields = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
    defaults = {name: raw[name] for name in fields if raw.get(name) is not None}
    if raw.get("do_sample") is False:
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except InvalidInput as error:
        raise CheckpointError(f"{file}: {error}") from None
    eos = raw.get("eos_token_id")
    eos = config.eos_token_id if eos is None else eos
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) for i in ids):
        raise CheckpointError(f"{file}: eos_token_id = {eos!r} is neither a token id nor a list of them")
    return tuple(i for i in ids if 0 <= i < config.vocab_size), defaults


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {_first_line(error)}") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {_first_line(error)}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: a JSON {type(raw).__name__}, not an object")
    return raw


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _progress(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """The names of the weights; from two seconds on with a bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("loading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(checkpoint.path.name, total=sum(map(math.prod, shapes.values())) * checkpoint.dtype.itemsize)
    begun, shown = time.monotonic(), False
    try:
        for name, shape in shapes.items():
            yield name
            bar.advance(task, math.prod(shape) * checkpoint.dtype.itemsize)
            if not shown and time.monotonic() - begun > 2 and sys.stderr.isatty():
                bar.start()
                shown = True
    finally:
        if shown:
            bar.stop()
