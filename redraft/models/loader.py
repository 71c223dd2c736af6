"""A checkpoint, a folder or a GGUF file, -> ModelSpec and Weights."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from redraft import registry
from redraft.core.spec import Experts, Mlp, ModelSpec, WeightSource
from redraft.errors import MAX_VALUE, CheckpointError, InvalidInput, Unsupported, shown
from redraft.models import packages
from redraft.models.checkpoint import INDEX, STORED, Safetensors, TensorInfo, TensorSource, refuse_adapter
from redraft.models.config import Config, Family, filled, first_line, read_json
from redraft.models.generation import read_defaults, read_eos
from redraft.models.gguf import config as gguf_config
from redraft.models.gguf import file as gguf_file
from redraft.models.gguf.weights import Gguf
from redraft.ops.arrays import DTYPES, Numbers, wide
from redraft.ops.backend import Backend, Feature, LayerWeights, Linear, LinearWeights, NormWeights, Weights
from redraft.ops.quantized import Quantized

if TYPE_CHECKING:
    from redraft.weights.quant import Quantizer, Role

_EMBEDDED = {"embedded": "target", "embedded-draft": "draft"}
_SHIPPED = "the model 'embedded' ships with Redraft"

_DOWNLOADED = ["model*.safetensors", INDEX, "*.json", "*.jinja", "tokenizer*", "*.txt", "*.model"]
CONFIG = "config.json"
_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)(attn|attention)\.(bias|masked_bias)$")  # buffers that old versions saved
_LINEAR = re.compile(
    r"(?P<base>(?P<layer>layers\.\d+)\.(?P<place>experts\.\d+\.|shared\.)?(?P<part>qkv|out|up|down|router|shared_gate))\.weight|head"
)
_NEVER_QUANTIZED = ("router", "shared_gate")
_NORM = re.compile(r"(?:layers\.\d+\.)?(?P<part>\w+_norm)\.weight")
_NORMS = {"qkv": "attn_norm", "up": "mlp_norm"}  # the norm that makes a matrix's inputs


@dataclass(frozen=True)
class Checkpoint:
    """What headers and JSON files say, before weights are read.

    path: the folder, or the GGUF file, of a split set the first; eos_ids: the tokens that end a text; sources: canonical name of a
    weight -> its tensors in the files; named: the spec with the names of a Hugging Face checkpoint, also for a GGUF file; stored:
    `quantization_config` of a folder.
    """

    path: Path
    spec: ModelSpec
    dtype: np.dtype[Any]
    eos_ids: tuple[int, ...]
    sources: dict[str, WeightSource] = field(repr=False)
    named: ModelSpec = field(repr=False)
    tensors: TensorSource = field(repr=False)
    quant: Quantizer | None = None
    stored: dict[str, Any] | None = None

    @property
    def context(self) -> int:
        return self.spec.context

    @property
    def keeps(self) -> bool:
        """Whether weights that are stored quantized stay so."""
        return self.quant is not None and getattr(self.quant, "keeps", False)

    def stores_codes(self) -> bool:
        """Whether there are such weights. The first and the last layer may be stored otherwise than those between."""
        count = len(self.spec.layers)
        places = dict.fromkeys((count // 2, 0, count - 1))
        names = (f"layers.{i}.{part}.weight" for i in places for part in ("down", "qkv", "up", "out", "experts.0.down"))
        found = (self.sources.get(name) for name in names)
        return any(source is not None and self.tensors.packed(source, None) is not None for source in found)

    @property
    def weight_bytes(self) -> int:
        """Of all weights in `dtype`; with `quant` an upper bound."""
        size = sum(map(self.bytes_of, self.spec.shapes()))
        head = self.head_bytes if self.spec.tied else 0
        return size + (head if head < self.bytes_of("embed") else 0)  # else the head is the embedding itself

    def bytes_of(self, name: str) -> int:
        """Of one weight; with `quant` an upper bound."""
        shape, linear = self.spec.shapes()[name], _LINEAR.fullmatch(name)
        if linear is None or linear["part"] in _NEVER_QUANTIZED:
            return math.prod(shape) * self.dtype.itemsize
        return self._linear_bytes(name, shape, "layer" if linear["part"] else "head")

    @property
    def head_bytes(self) -> int:
        """Of the head of a model whose embedding has its numbers."""
        return self._linear_bytes("embed", (self.spec.vocab, self.spec.hidden), "head")

    def _linear_bytes(self, name: str, shape: tuple[int, ...], role: Role) -> int:
        if self.keeps and (found := self.tensors.packed_bytes(self.sources[name])) is not None:
            return found
        plain = math.prod(shape) * self.dtype.itemsize
        return plain if self.quant is None or self.keeps else self.quant.bytes(shape[0], shape[1], self.dtype, role)

    @property
    def defaults(self) -> dict[str, Any]:
        """Fields of SamplingParams that generation_config.json sets; see `read_defaults`."""
        return read_defaults(self.path, self.eos_ids, self.spec.vocab)


def resolve(model: str) -> Path:
    """The folder of a model: 'embedded' or 'embedded-draft', a path, a name that `redraft get` downloaded, or a hub id (`org/name` or
    `org/name@revision`). A hub model is downloaded unless it is cached; HF_HOME and HF_HUB_OFFLINE apply. For a GGUF file, or a folder
    with one and without config.json, that file; of a split set the first. CheckpointError if it is none of these."""
    if model in _EMBEDDED:
        return Path(__file__).parent.parent / "embedded" / _EMBEDDED[model]
    name = model if model.isprintable() and len(model) <= MAX_VALUE else shown(model)
    path = Path(model).expanduser()
    if model in packages.PACKAGES and not path.exists():
        if packages.place(model).exists():
            return packages.place(model)
        raise CheckpointError(f"{model}: not downloaded yet: redraft get {model}")
    try:
        if path.is_dir():
            return path if (path / CONFIG).exists() else gguf_file.only(path) or path
        is_file = path.exists()
    except OSError as error:  # the name is too long, or a folder on the way cannot be read
        raise CheckpointError(f"{name}: {error.strerror}") from None
    if path.suffix == gguf_file.SUFFIX:
        whole = gguf_file.first(path)
        if not whole.exists():
            raise CheckpointError(f"{whole if is_file else name}: no such file")
        return whole
    if is_file:
        raise CheckpointError(f"{name}: is a file; a model is a GGUF file, or the folder with config.json and safetensors weights")
    hub = _HUB_ID.fullmatch(model)
    if hub is None:
        raise CheckpointError(f"{name}: no such folder, and not a hub id (org/name or org/name@revision); {_SHIPPED}")
    from huggingface_hub import snapshot_download

    try:
        # top-level files only: subfolders hold originals and exports for other runtimes
        found = snapshot_download(hub["repo"], revision=hub["revision"], allow_patterns=_DOWNLOADED, ignore_patterns=["*/*"])
    except Exception as error:  # the hub's client raises errors of three libraries
        raise CheckpointError(f"{model}: no such folder, and the hub does not provide it: {first_line(error)}; {_SHIPPED}") from None
    return Path(found)


def read_config(path: Path) -> Config:
    """The config of a folder or GGUF file, with its family's defaults filled in. CheckpointError or Unsupported says what is wrong with
    it."""
    if _is_gguf(path):
        return _filled(gguf_config.config(gguf_file.read(path)), path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    refuse_adapter(path)
    file = path / CONFIG
    if not file.exists():
        raise CheckpointError(f"{path}: no {CONFIG}")
    raw = read_json(file)
    quantized = raw.get("quantization_config") or raw.get("compression_config")
    if quantized:
        if not isinstance(quantized, dict):
            raise CheckpointError(f"{file}: quantization_config = {shown(quantized)}: must be an object")
        method = quantized.get("quant_method", "bitsandbytes")
        if not isinstance(method, str) or method not in registry.STORED:
            raise Unsupported(f"{path}: weights quantized by {shown(method)} are not read; known: {', '.join(registry.STORED)}")
        raw["quantization_config"] = quantized
    if _architecture(raw.get("architectures")) not in registry.FAMILIES:
        raise Unsupported(f"{file}: unknown architecture {raw.get('architectures')!r}; known: {', '.join(registry.FAMILIES)}")
    return _filled(Config(**raw), file)


def _filled(config: Config, where: Path) -> Config:
    """With its family's defaults. CheckpointError names what does not fit the family."""
    family: Family = registry.load(registry.FAMILIES[_architecture(config.architectures)])
    try:
        found = filled(config, {"model_type": family.name, **family.defaults})
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if found.model_type != family.name:
        raise CheckpointError(f"{where}: model_type {shown(found.model_type)} does not fit {found.architectures}")
    return found


def _is_gguf(path: Path) -> bool:
    return path.suffix == gguf_file.SUFFIX and path.is_file()


def _architecture(names: Any) -> str:
    return str(names[0]) if isinstance(names, list) and names else ""


def inspect(
    path: Path,
    dtype: str = "auto",
    device: Any = "cpu",
    quant: Quantizer | None = None,
    max_model_len: int | None = None,
) -> Checkpoint:
    """Checks the whole checkpoint by its headers: every weight exists with the right shape, and no tensor is left over.

    dtype 'auto' is the checkpoint's own. On the CPU float16 becomes float32, because float16 is slow there and may overflow. quant: how
    linear weights are stored, see `read`. max_model_len: the longest text, on which some scalings of positions depend; None: the
    context. Raises CheckpointError or Unsupported, one line each.
    """
    contents = gguf_file.read(path) if _is_gguf(path) else None
    config = _filled(gguf_config.config(contents), path) if contents else read_config(path)
    where = path if contents else path / CONFIG
    config.max_model_len = max_model_len
    family: Family = registry.load(registry.FAMILIES[_architecture(config.architectures)])
    try:
        spec = family.spec(config)
    except (CheckpointError, Unsupported) as error:
        raise type(error)(f"{where}: {error}") from None
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:  # a field is missing or out of range
        raise CheckpointError(f"{where}: {first_line(error)}") from None
    tensors: TensorSource = Gguf(contents) if contents else Safetensors(path)
    fields = None if contents else getattr(config, "quantization_config", None)
    if isinstance(tensors, Safetensors) and fields:
        tensors = registry.load(registry.STORED[fields["quant_method"]])(tensors, fields, where)
    named = spec
    if contents:
        spec = gguf_config.spec(contents, spec)
    spec = _without_prefix(spec, tensors)
    sources = {name: _check(where, tensors, name, spec.source(name), shape) for name, shape in spec.shapes().items()}
    _check_nothing_left(spec, sources, tensors)
    chosen = _dtype(config, dtype, str(device), tensors.tensors[sources["embed"].names[0]])
    eos_ids = read_eos(path, getattr(config, "eos_token_id", family.eos), where, spec.vocab)
    return Checkpoint(path, spec, chosen, eos_ids, sources, named, tensors, quant, fields)


def _without_prefix(spec: ModelSpec, tensors: TensorSource) -> ModelSpec:
    """The spec without the prefix of tensor names, if the files lack it. That is so if a class without a head was saved, as for GPT-2
    and embedding models."""
    if any(name.startswith(spec.prefix) for name in tensors.tensors):
        return spec
    body = (name for name in spec.shapes() if name != "head")
    if not any(_bare(spec, spec.source(name)).names[0] in tensors.tensors for name in body):
        return spec  # errors about missing tensors then give full names
    return replace(spec, source=lambda name: _bare(spec, spec.source(name)))


def _bare(spec: ModelSpec, source: WeightSource) -> WeightSource:
    names = tuple(name.removeprefix(spec.prefix) for name in source.names)
    return replace(source, names=names, otherwise=source.otherwise and _bare(spec, source.otherwise))


class Parts(NamedTuple):
    """The weights of a model by canonical names. Without the tensor `embed`, the head is tied and holds the embedding's numbers."""

    tensors: dict[str, Any]
    linears: dict[str, LinearWeights]


def read(checkpoint: Checkpoint, backend: Backend | None = None, *, as_stored: bool | None = None) -> Weights:
    """All weights; see `parts`."""
    return assemble(checkpoint.spec, parts(checkpoint, backend, as_stored))


def parts(checkpoint: Checkpoint, backend: Backend | None = None, as_stored: bool | None = None) -> Parts:
    """The weights of an inspected checkpoint, in its `dtype`, for a backend; None: as numpy arrays. Each is filled in place from the
    mapped files. The checkpoint's `quant` and then Backend.pack give a linear weight its final form before the next weight is read, so
    that at most one weight is in memory twice at any time. as_stored: weights that are stored quantized are not decoded, if the quantizer
    keeps them; None: if the backend multiplies them as fast as others."""
    pack = backend.pack if backend else lambda weights, gated: weights
    place = backend.place if backend else lambda array: array
    if as_stored is None:
        as_stored = backend is not None and Feature.GROUPED in backend.features
    as_stored = as_stored and checkpoint.keeps
    tensors: dict[str, Numbers] = {}
    linears: dict[str, LinearWeights] = {}
    shapes = checkpoint.spec.shapes()

    def filled(name: str) -> Numbers:
        source = checkpoint.sources[name]
        if len(source.names) == 1 and not (source.place or source.transposed or any(source.paired) or source.order or source.skip):
            found = checkpoint.tensors.read(source.names[0], None, checkpoint.dtype)
            with np.errstate(over="ignore", invalid="ignore"):
                return found.astype(checkpoint.dtype, "C", copy=False)
        out = np.empty(shapes[name], checkpoint.dtype)
        for (part, target), heads in zip(_parts(source, out), source.paired or [0] * len(source.names), strict=True):
            chosen = source.place[0] if source.place else slice(source.skip, None) if source.skip else None
            found = checkpoint.tensors.read(part, chosen, checkpoint.dtype)
            if heads:
                rest = target.shape[1:]
                target.reshape(heads, 2, -1, *rest)[:] = found.reshape(heads, -1, 2, *rest).swapaxes(1, 2)
            else:
                with np.errstate(over="ignore", invalid="ignore"):  # large numbers become infinite, NaN stays
                    target[:] = found.T if source.transposed else found
        return out[list(source.order)] if source.order else out

    def tie() -> None:
        """The head of a model whose embedding has its numbers."""
        if "lm_head.weight" in checkpoint.tensors.tensors:
            saved = checkpoint.tensors.read("lm_head.weight")
            if not np.array_equal(saved.astype(checkpoint.dtype), tensors["embed"]):
                raise CheckpointError(f"{checkpoint.path}: lm_head.weight differs from the embedding, but tie_word_embeddings is true")
        if "head" in linears:
            return
        stored = _stored(checkpoint, None, Linear(tensors["embed"]), tensors)
        shared = isinstance(stored, Linear)
        if shared:
            tensors["embed"] = place(tensors["embed"])  # once for both
            stored = Linear(tensors["embed"])
        linears["head"] = head = pack(stored, False)
        if shared and not isinstance(head, Linear):  # the head holds the same numbers, so the embedding is dropped
            del tensors["embed"]

    # biases and norms come first, because matrices are packed together with them; then the largest, so its copy meets no other weights
    order = sorted(shapes, key=lambda name: (len(shapes[name]) > 1, -math.prod(shapes[name])))
    for name in _progress(checkpoint, {name: shapes[name] for name in order}):
        if linear := _LINEAR.fullmatch(name):
            base = linear["base"] or name
            bias = tensors.get(f"{base}.bias")
            keeps = as_stored and linear["part"] not in _NEVER_QUANTIZED
            kept = checkpoint.tensors.packed(checkpoint.sources[name], bias) if keeps else None
            stored = _stored(checkpoint, linear, Linear(filled(name), bias), tensors) if kept is None else kept
            linears[base] = pack(stored, linear["part"] == "up" and _gated(checkpoint.spec, linear))
            del stored, kept
        elif name == "embed" and checkpoint.spec.tied and as_stored and (kept := checkpoint.tensors.packed(checkpoint.sources[name], None)):
            linears["head"] = pack(kept, False)
            if isinstance(linears["head"], Linear | Quantized):  # else the head gives embeddings too
                tensors[name] = filled(name)
            del kept
        elif (found := _NORM.fullmatch(name)) and _above_one(checkpoint.spec, found["part"]):
            tensors[name] = filled(name).astype(wide(checkpoint.dtype)) + 1
        elif name.endswith(".sink_logits"):
            tensors[name] = filled(name).astype(wide(checkpoint.dtype))
        else:
            tensors[name] = filled(name)
        if name == "embed" and checkpoint.spec.tied and name in tensors:
            tie()
    return Parts({name: place(array) for name, array in tensors.items()}, linears)


def _gated(spec: ModelSpec, linear: re.Match[str]) -> bool:
    mlp = spec.layers[int(linear["layer"].removeprefix("layers."))].mlp
    if isinstance(mlp, Experts):
        mlp = mlp.shared if mlp.shared and linear["place"] == "shared." else mlp.mlp
    return mlp.gated


def _above_one(spec: ModelSpec, part: str) -> bool:
    """Whether the checkpoint stores the gains of these norms, of all layers, less 1."""
    first = spec.layers[0]
    if part in ("q_norm", "k_norm"):
        norm = spec.attention[0].qk_norm
    else:
        norm = {"final_norm": spec.final_norm, "attn_norm": first.norm, "mlp_norm": first.norm}.get(part, first.post_norm)
    return norm is not None and norm.above_one


def _stored(checkpoint: Checkpoint, linear: re.Match[str] | None, weights: Linear, tensors: dict[str, Numbers]) -> LinearWeights:
    """The weights as the checkpoint's `quant` stores them. linear: the match of their name; None: the tied head."""
    part = linear["part"] if linear else None
    if checkpoint.quant is None or part in _NEVER_QUANTIZED:
        return weights
    norm = f"{linear['layer']}.{_NORMS[part]}" if linear and part in _NORMS else None if part else "final_norm"
    gains = None
    if norm is not None and f"{norm}.weight" in tensors:
        gains = abs(tensors[f"{norm}.weight"])
        if (shift := tensors.get(f"{norm}.bias")) is not None:
            gains = gains + abs(shift)
    try:
        return checkpoint.quant.quantize(weights, "layer" if part else "head", gains)
    except Unsupported as error:
        raise Unsupported(f"{checkpoint.path}: {linear[0] if linear else 'head'}: {error}") from None


def meta_weights(checkpoint: Checkpoint) -> Weights:
    """Weights with shapes only, nothing is read. For a Runner that only describes itself."""
    tensors = {name: _empty(shape, checkpoint.dtype) for name, shape in checkpoint.spec.shapes().items()}
    linears: dict[str, LinearWeights] = {"head": Linear(tensors["embed"])}
    for name, tensor in tensors.items():
        if linear := _LINEAR.fullmatch(name):
            base = linear["base"] or name
            linears[base] = Linear(tensor, tensors.get(f"{base}.bias"))
    return assemble(checkpoint.spec, Parts(tensors, linears))


def _empty(shape: tuple[int, ...], dtype: Any = np.float32) -> Numbers:
    """An array without memory of its own."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def assemble(spec: ModelSpec, parts: Parts) -> Weights:
    """Weights from named parts. KeyError names one that is missing."""
    tensors, linears = parts

    def norm(name: str) -> NormWeights | None:
        return NormWeights(tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) if f"{name}.weight" in tensors else None

    def layer(at: str, mlp: Mlp | Experts) -> LayerWeights:
        experts = [f"{at}.experts.{e}" for e in range(mlp.count)] if isinstance(mlp, Experts) else []
        router = linears.get(f"{at}.router")
        assert not isinstance(router, Quantized)
        return LayerWeights(
            qkv=linears[f"{at}.qkv"],
            out=linears[f"{at}.out"],
            attn_norm=norm(f"{at}.attn_norm"),
            mlp_norm=norm(f"{at}.mlp_norm"),
            attn_post_norm=norm(f"{at}.attn_post_norm"),
            mlp_post_norm=norm(f"{at}.mlp_post_norm"),
            q_norm=norm(f"{at}.q_norm"),
            k_norm=norm(f"{at}.k_norm"),
            sink_logits=tensors.get(f"{at}.sink_logits"),
            up=linears.get(f"{at}.up"),
            down=linears.get(f"{at}.down"),
            router=router,
            shared_up=linears.get(f"{at}.shared.up"),
            shared_down=linears.get(f"{at}.shared.down"),
            shared_gate=linears.get(f"{at}.shared_gate"),
            experts_up=tuple(linears[f"{one}.up"] for one in experts),
            experts_down=tuple(linears[f"{one}.down"] for one in experts),
        )

    return Weights(
        embed=tensors["embed"] if "embed" in tensors else linears["head"],
        head=linears["head"],
        final_norm=NormWeights(tensors["final_norm.weight"], tensors.get("final_norm.bias")),
        layers=tuple(layer(f"layers.{i}", own.mlp) for i, own in enumerate(spec.layers)),
        positions=tensors.get("positions"),
    )


def _parts(source: WeightSource, out: Numbers) -> Iterator[tuple[str, Numbers]]:
    """(name of a stored tensor, the view of the weight that it fills), for each tensor of a weight."""
    rows = source.rows or [len(out) // len(source.names)] * len(source.names)
    ends = list(accumulate(rows))
    yield from zip(source.names, (out[end - count : end] for end, count in zip(ends, rows, strict=True)), strict=True)


def _check(where: Path, tensors: TensorSource, name: str, source: WeightSource, shape: tuple[int, ...]) -> WeightSource:
    """The source or its alternative, whichever is in the files. Checks that every tensor exists, with a supported dtype and the shape
    that the file `where` asks for."""
    found = tensors.tensors
    while source.names[0] not in found and source.otherwise and source.otherwise.names[0] in found:
        source = source.otherwise
    for part, target in _parts(source, _empty(shape)):
        if part not in found:
            why = " (tie_word_embeddings is false)" if name == "head" else ""
            raise CheckpointError(f"{tensors.index}: missing tensor {part}{why}")
        entry = found[part]
        expected = tuple(target.T.shape) if source.transposed else (target.shape[0] + source.skip, *target.shape[1:])
        if source.place:
            expected = source.place[1], *expected
        if entry.shape != expected:
            by = where.name if where.name == CONFIG else "the metadata"
            raise CheckpointError(f"{entry.file}: {part} has shape {list(entry.shape)}, expected {list(expected)} from {by}")
        if entry.dtype not in tensors.dtypes:
            raise Unsupported(f"{entry.file}: {part} has dtype {entry.dtype}; known: {', '.join(tensors.dtypes)}")
    return source


def _check_nothing_left(spec: ModelSpec, sources: dict[str, WeightSource], tensors: TensorSource) -> None:
    left = set(tensors.tensors).difference(*(source.names for source in sources.values()))
    left = {name for name in left if not _HARMLESS.search(name) and not (spec.tied and name == "lm_head.weight")}
    left = {name for name in left if not name.startswith(spec.others)} if spec.others else left
    if left:
        first = min(left)
        raise CheckpointError(f"{tensors.tensors[first].file}: {len(left)} tensors unknown to a {spec.family} model, the first is {first}")


def _dtype(config: Config, requested: str, device: str, embed: TensorInfo) -> np.dtype[Any]:
    if requested != "auto":
        if requested not in DTYPES:
            raise InvalidInput(f"dtype = {requested!r}: allowed are auto, {', '.join(DTYPES)}")
        return DTYPES[requested]
    named = str(getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)).removeprefix("torch.")
    own = DTYPES[named] if named in DTYPES else STORED[embed.dtype]
    return DTYPES["float32"] if own == np.float16 and device.startswith("cpu") else own


def _progress(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """The names of the weights. After two seconds, a progress bar appears on stderr if that is a terminal."""
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
