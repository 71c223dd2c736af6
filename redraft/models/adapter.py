"""Low-rank adapters (LoRA) in the folders that PEFT writes: what they add to the linear layers of a model.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv 2106.09685; the
factor with the square root of the rank: Kalajdzievski, rsLoRA, 2023, arXiv 2312.03732.

For the rows of a request with an adapter, y = W x becomes y + B A x * alpha / r, with y rounded to the dtype of the model before and after.
An embedding or a head that was trained as a whole (modules_to_save) replaces the model's for these rows.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
from pydantic_core import SchemaError, SchemaValidator, core_schema

from redraft.core.batch import Batch
from redraft.core.spec import ModelSpec, WeightSource
from redraft.core.tree import I64
from redraft.errors import CheckpointError, OutOfMemory, Unsupported, did_you_mean, shown
from redraft.models import memory
from redraft.models.checkpoint import STORED, TensorFile
from redraft.models.config import read_json
from redraft.ops.arrays import Numbers, array, numpy_dtype, replaced
from redraft.ops.backend import Adapted, Backend, ForwardResult, LayerWeights, Linear, LinearWeights, LowRank

TITLE = "LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv 2106.09685"
CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LARGEST_RANK = 1024
LARGEST_ALPHA = 1e6
LONGEST_NAME = 1024  # characters of a tensor's name
LONGEST_PATTERN = 200  # characters of a key of rank_pattern or alpha_pattern
LONGEST_MATCHING = 10.0  # seconds for all keys of a pattern

_LINEAR = re.compile(r"layers\.(?P<layer>\d+)\.(?P<part>qkv|out|up|down)\.weight")
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# Fields without a meaning for a trained adapter, or whose meaning its tensors show.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_READ = {"alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "r", "rank_pattern", "use_rslora"}
_PREFIXES = ("base_model", "decoder", "gpt_neox", "language_model", "model", "transformer")
_INITS = (True, False, "gaussian", "orthogonal", "eva")  # others change the base model's weights


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory. digest: of what it adds and replaces; spec: of the model that it belongs to; layers: for each layer, the name
    of a LayerWeights field -> its terms; embed, head: in place of the model's, or None."""

    name: str
    digest: str
    spec: ModelSpec
    layers: tuple[Mapping[str, tuple[LowRank, ...]], ...]
    embed: Any = None
    head: LinearWeights | None = None

    @property
    def bytes(self) -> int:
        return sum(term.a.nbytes + term.b.nbytes for term in self.terms())

    def terms(self) -> Iterator[LowRank]:
        return (term for layer in self.layers for terms in layer.values() for term in terms)

    def salted(self, salt: str) -> str:
        """The salt of a request in the prefix cache: keys and values of an adapter are its own, also under a name that was another's. The
        digest comes first, so that no salt of a request without an adapter is equal."""
        return f"{self.digest}\0{salt}"


def unknown(name: Any, adapters: Mapping[str, Adapter]) -> str:
    """The error about a name that none of the adapters has."""
    return f"lora = {shown(name)}: " + (did_you_mean(str(name), list(adapters)) if adapters else "no adapter is loaded")


def own_rows(batch: Batch) -> list[tuple[Adapter, I64]]:
    """The adapters of a batch, each with its rows, i64."""
    rows: dict[Adapter, list[int]] = {}
    for s, adapter in enumerate(batch.adapters):
        if adapter is not None:
            rows.setdefault(adapter, []).extend(range(int(batch.starts[s]), int(batch.starts[s + 1])))
    return [(adapter, np.array(own, np.int64)) for adapter, own in rows.items()]


def adapted(weights: LayerWeights, layer: int, chosen: list[tuple[Adapter, I64]]) -> LayerWeights:
    """The weights of a layer with the terms of these adapters for their rows."""
    changed: dict[str, Any] = {}
    for name in {name for adapter, _ in chosen for name in adapter.layers[layer]}:
        terms = tuple((rows, term) for adapter, rows in chosen for term in adapter.layers[layer].get(name, ()))
        changed[name] = Adapted(getattr(weights, name), terms)
    return replace(weights, **changed) if changed else weights


def embedded(h: Any, batch: Batch, chosen: list[tuple[Adapter, I64]]) -> Any:
    """The embeddings h [T, hidden] with those of adapters that have their own."""
    for adapter, rows in chosen:
        if adapter.embed is not None:
            h = replaced(h, rows, adapter.embed[batch.tokens[rows].astype(np.int64)])
    return h


def headed(
    out: ForwardResult, batch: Batch, chosen: list[tuple[Adapter, I64]], head: Callable[[LinearWeights], ForwardResult]
) -> ForwardResult:
    """What the head gives, with the rows of adapters that have their own from theirs. head: computes all rows with another head."""
    for adapter, rows in chosen:
        if adapter.head is None:
            continue
        own = np.flatnonzero(np.isin(batch.logit_rows, rows))
        if not len(own):
            continue
        other = head(adapter.head)
        argmax, top_k, logits = out.argmax.copy(), out.top_k, out.logits
        argmax[own] = other.argmax[own]
        if top_k is not None and other.top_k is not None:
            top_k = top_k.copy()
            top_k[own] = other.top_k[own]
        if logits is not None and other.logits is not None:
            logits = replaced(logits, own, other.logits[own])
        out = out._replace(argmax=argmax, top_k=top_k, logits=logits)
    return out


# ---- reading


class _Target(NamedTuple):
    """A module of the checkpoint: rows `rows` of what is stored for a linear layer, with `source.order` as of the whole layer."""

    layer: int
    part: str
    rows: range
    outs: int  # of the whole layer
    ins: int
    source: WeightSource


def read(name: str, folder: str | Path, spec: ModelSpec, named: ModelSpec, backend: Backend) -> Adapter:
    """The adapter in a PEFT folder. spec: of the loaded model; named: the same with the names of a Hugging Face checkpoint.
    CheckpointError or Unsupported, one line each, names the file and what is wrong; OutOfMemory has the figures."""
    folder = Path(os.path.expanduser(folder))
    file = folder / CONFIG
    try:
        if not file.is_file():
            raise CheckpointError(f"{shown(str(folder))}: no adapter: it has no {CONFIG}")
        config = read_json(file)
        _check(file, config)
        if not (folder / TENSORS).is_file():
            pickled = (folder / PICKLED).exists()
            why = f"holds {PICKLED} only, which could run code; save it as {TENSORS}" if pickled else f"has no {TENSORS}"
            raise CheckpointError(f"{folder}: {why}")
    except OSError as error:  # the name is too long, or a folder on the way cannot be read
        raise CheckpointError(f"{shown(str(folder))}: {error.strerror}") from None
    stored = TensorFile(folder / TENSORS)
    _check_room(folder, stored, backend)
    modules: dict[str, dict[str, str]] = {}
    names: dict[str, str] = {}  # of modules as in the file, because patterns may begin with their first parts
    whole: dict[str, Numbers] = {}
    dtype = numpy_dtype(backend.dtype)
    for tensor in stored.tensors:
        if len(tensor) > LONGEST_NAME:
            raise CheckpointError(f"{stored.file}: {shown(tensor)}: a name has at most {LONGEST_NAME} characters")
        if (part := _whole(tensor, named)) is not None:
            if part in whole:
                raise CheckpointError(f"{stored.file}: {shown(tensor)} is there twice, under two names")
            whole[part] = _rounded(_matrix(stored, tensor, (spec.vocab, spec.hidden)), dtype)
            if not np.isfinite(whole[part]).all():
                raise CheckpointError(f"{stored.file}: {tensor} holds numbers that are too large for {dtype}")
            continue
        if (found := _TENSOR.fullmatch(tensor)) is None:
            raise Unsupported(f"{stored.file}: {shown(tensor)}: only lora_A and lora_B of linear layers, embeddings and heads are applied")
        bare = _bare(found["module"])
        names[bare] = found["module"]
        sides = modules.setdefault(bare, {})
        if found["side"] in sides:
            raise CheckpointError(f"{stored.file}: {shown(tensor)} is there twice, also as {shown(sides[found['side']])}")
        sides[found["side"]] = tensor
    if not modules and not whole:
        raise CheckpointError(f"{stored.file}: holds no tensors")
    if spec.tied and len(whole) == 1 and config.get("ensure_weight_tying"):
        whole = dict.fromkeys(("embed", "head"), *whole.values())
    if "embed" in whole and spec.learned_positions:
        raise Unsupported(f"{stored.file}: embeddings of a model with learned positions are not replaced")
    targets = dict(_targets(spec, named))
    ranks, alphas = (_matched(file, config, field, list(names.values())) for field in ("rank_pattern", "alpha_pattern"))
    layers: list[dict[str, tuple[LowRank, ...]]] = [{} for _ in spec.layers]
    for module, sides in modules.items():
        target = targets.get(module)
        if target is None:
            allowed = "only query, key, value, output and MLP projections of this model's layers can be"
            raise Unsupported(f"{stored.file}: {shown(module)} is adapted: {allowed}")
        if missing := {"A", "B"} - sides.keys():
            raise CheckpointError(f"{stored.file}: {module}: lora_{missing.pop()}.weight is missing")
        full = names[module]
        rank, factor = _scaling(ranks.get(full, config.get("r", 8)), alphas.get(full, config.get("lora_alpha", 8)), config, file)
        term = _term(stored, module, sides, target, rank, factor, backend)
        layers[target.layer][target.part] = (*layers[target.layer].get(target.part, ()), term)
    embed, head = (None if part not in whole else backend.place(whole[part]) for part in ("embed", "head"))
    packed = None if head is None else backend.pack(Linear(head))
    return Adapter(name, _digest(layers, whole), spec, tuple(layers), embed, packed)


def _check_room(folder: Path, stored: TensorFile, backend: Backend) -> None:
    """OutOfMemory unless the tensors fit: in the dtype of the model, and the largest, while it is read, also as stored and in float64."""
    counts = [math.prod(info.shape) for info in stored.tensors.values()]
    needed = sum(counts) * backend.dtype.itemsize + 2 * max(counts, default=0) * np.dtype(np.float64).itemsize
    if needed > (free := memory.limits(backend.device)):
        raise OutOfMemory(f"{folder}: the adapter does not fit: it needs {memory.size(needed)}, free {memory.size(free)}")


def _whole(tensor: str, named: ModelSpec) -> str | None:
    """The weight that a tensor replaces as a whole: embed, head or none."""
    module = _bare(re.sub(r"(\.modules_to_save)?(\.default)?\.weight$", "", tensor))
    names = {part: "lm_head.weight" if part == "head" and named.tied else named.source(part).names[0] for part in ("embed", "head")}
    return next((part for part, name in names.items() if _bare(name.removesuffix(".weight")) == module), None)


def _check(file: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Unsupported(f"{file}: peft_type = {shown(kind)}: only LORA adapters are applied")
    if config.get("use_dora"):
        raise Unsupported(f"{file}: use_dora = true: DoRA scales the columns of the merged weight, which is not applied")
    if (bias := config.get("bias", "none")) != "none":
        raise Unsupported(f"{file}: bias = {shown(bias)}: only none is applied")
    if (init := config.get("init_lora_weights", True)) not in _INITS:
        raise Unsupported(
            f"{file}: init_lora_weights = {shown(init)}: it changes the base model; allowed: true, false, gaussian, orthogonal, eva"
        )
    if not isinstance(rooted := config.get("use_rslora", False), bool):
        raise CheckpointError(f"{file}: use_rslora = {shown(rooted)}: must be true or false")
    for field, value in config.items():
        if value and field not in _HARMLESS | _READ:
            raise Unsupported(f"{file}: {shown(field)} = {shown(value)}: this kind of adapter is not applied")


def _targets(spec: ModelSpec, named: ModelSpec) -> Iterator[tuple[str, _Target]]:
    """The bare name of each module, and what it is here."""
    for name, shape in spec.shapes().items():
        if (found := _LINEAR.fullmatch(name)) is None:
            continue
        source, end = named.source(name), 0
        counts = source.rows or (shape[0] // len(source.names),) * len(source.names)
        for part, count in zip(source.names, counts, strict=True):
            begin, end = end, end + count
            yield (
                _bare(part.removesuffix(".weight")),
                _Target(int(found["layer"]), found["part"], range(begin, end), shape[0], shape[1], source),
            )


def _bare(module: str) -> str:
    """The name without its first parts, which differ between classes of transformers and say nothing. Those of other models in the same
    checkpoint, such as a vision encoder, stay."""
    first, dot, rest = module.partition(".")
    return _bare(rest) if dot and first in _PREFIXES else module


def _term(stored: TensorFile, module: str, sides: dict[str, str], target: _Target, rank: int, factor: float, backend: Backend) -> LowRank:
    if target.source.skip or target.source.place:
        raise Unsupported(f"{stored.file}: {shown(module)} is adapted: a part of a stored tensor cannot be")
    a, b = (_matrix(stored, sides[side], shape) for side, shape in (("A", (rank, target.ins)), ("B", (len(target.rows), rank))))
    places = np.array(target.rows)  # of the outputs in the layer
    if target.source.order:
        order = np.array(target.source.order)  # where each output is stored
        places = np.flatnonzero((order >= target.rows.start) & (order < target.rows.stop))
        b = b[order[places] - target.rows.start]
    first, last = int(places[0]), int(places[-1]) + 1
    spread, dtype = np.zeros((last - first, rank)), numpy_dtype(backend.dtype)
    spread[places - first] = b.astype(np.float64) * factor
    a, b = _rounded(a, dtype), _rounded(spread.T, dtype)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise CheckpointError(f"{stored.file}: {module}: numbers of lora_A, or of lora_B times lora_alpha / r, are too large for {dtype}")
    return LowRank(backend.place(a), backend.place(b), first)


def _rounded(numbers: Numbers, dtype: np.dtype[Any]) -> Numbers:
    """Contiguous, in memory of its own."""
    with np.errstate(over="ignore"):
        return np.array(numbers, dtype, order="C")


def _matrix(stored: TensorFile, name: str, shape: tuple[int, int]) -> Numbers:
    info = stored.tensors[name]
    if info.dtype not in STORED:
        raise CheckpointError(f"{stored.file}: {name} has dtype {info.dtype}, expected {', '.join(STORED)}")
    if info.shape != shape:
        raise CheckpointError(f"{stored.file}: {name} has shape {list(info.shape)}, expected {list(shape)}")
    found = stored.read(name)
    if not np.isfinite(found).all():
        raise CheckpointError(f"{stored.file}: {name} holds infinite or undefined numbers")
    return found


def _matched(file: Path, config: dict[str, Any], field: str, modules: list[str]) -> dict[str, Any]:
    """The values of modules whose name, or the end of it, a key of `rank_pattern` or `alpha_pattern` matches: that of the first such key.
    Keys are regular expressions. Rust's engine, which comes with pydantic, takes time linear in the name; a hostile key can keep Python's
    busy for ever."""
    named = config.get(field) or {}
    if not isinstance(named, dict):
        raise CheckpointError(f"{file}: {field} = {shown(named)}: must be an object")
    found: dict[str, Any] = {}
    end = monotonic() + LONGEST_MATCHING

    def check_time() -> None:
        if monotonic() > end:
            raise CheckpointError(f"{file}: {field}: its {len(named)} keys take more than {LONGEST_MATCHING:g} seconds to match")

    for key, value in named.items():
        if len(key) > LONGEST_PATTERN:
            raise CheckpointError(f"{file}: {field}: {shown(key)} has {len(key)} characters: at most {LONGEST_PATTERN} are allowed")
        try:
            pattern = SchemaValidator(core_schema.str_schema(pattern=rf"^(?:(.*\.)?({key})$)"))
        except SchemaError:
            kind = "no regular expression, or one that is not read: too large, with look-around or with references to groups"
            raise CheckpointError(f"{file}: {field}: {shown(key)} is {kind}") from None
        check_time()
        for module in modules:
            check_time()
            if module not in found and pattern.isinstance_python(module):
                found[module] = value
    return found


def _scaling(rank: Any, alpha: Any, config: dict[str, Any], file: Path) -> tuple[int, float]:
    """(rank, factor)"""
    if type(rank) is not int or not 1 <= rank <= LARGEST_RANK:
        raise CheckpointError(f"{file}: r = {shown(rank)}: must be 1 to {LARGEST_RANK}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST_ALPHA:
        raise CheckpointError(f"{file}: lora_alpha = {shown(alpha)}: must be a number of at most {LARGEST_ALPHA:g}")
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _digest(layers: list[dict[str, tuple[LowRank, ...]]], whole: Mapping[str, Numbers]) -> str:
    found = hashlib.sha256()
    for i, layer in enumerate(layers):
        for part, terms in sorted(layer.items()):
            for term in sorted(terms, key=lambda term: term.first):
                found.update(f"{i} {part} {term.first} {[*term.a.shape, *term.b.shape]}".encode())
                found.update(_raw(term.a) + _raw(term.b))
    for part, numbers in sorted(whole.items()):
        found.update(part.encode() + _raw(numbers))
    return found.hexdigest()[:32]


def _raw(numbers: Any) -> bytes:
    return array(numbers).tobytes()
