"""Loads a draft model next to a target's Runner: the same backend, mostly the same vocabulary, its own weights and memory."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from redraft.errors import CheckpointError, InvalidInput, OutOfMemory
from redraft.models import loader, memory, mixers, packs
from redraft.models.runner import Runner
from redraft.models.tokenizer import Tokenizer
from redraft.ops.arrays import name_of
from redraft.ops.backend import Weights

SHARE = 0.5  # the draft model's pool takes at most this part of what is free after the weights


def load_draft_model(target: Runner, model: str | None, *, translated: bool = False) -> Runner:
    """The draft model: `model`, else the target's `draft_model`, else the embedded draft model if the target is embedded.

    It is loaded once for each target, with the target's dtype and quantization. If the target is on the meta device, so is the draft
    model. Its pool has as many blocks as the target's, so that it can hold the same sequences. If memory is short, the pool is
    smaller, and sequences without pages get no drafts. translated: its vocabulary may be another one. Raises InvalidInput if no model is
    named, CheckpointError if the vocabularies differ, OutOfMemory with figures.
    """
    chosen = model or target.draft_model
    if chosen is None and target.source == loader.resolve("embedded"):
        chosen = "embedded-draft"
    if chosen is None:
        raise InvalidInput("a draft model is needed but none is named: give --draft-model FOLDER, or the method's option model=FOLDER")
    path = loader.resolve(chosen)
    if not translated and target.source is not None:
        check_vocabulary(target.source, path)
    if path not in target.draft_models:
        target.draft_models[path] = _load(target, path)
    found = target.draft_models[path]
    if target.source is None and not translated and found.spec.vocab != target.spec.vocab:
        raise CheckpointError(f"{path}: the draft model's vocabulary is {found.spec.vocab}, the target's {target.spec.vocab}")
    return found


def _load(target: Runner, path: Path) -> Runner:
    backend = target.backend
    checkpoint = loader.inspect(path, name_of(backend.dtype), backend.device, target.quant)
    mixers.check(checkpoint.spec, backend)
    if target.weights.head.meta:
        return Runner(checkpoint.spec, loader.meta_weights(checkpoint), backend, 1, source=path)
    free = memory.limits(backend.device)
    left = free - checkpoint.weight_bytes
    blocks = min(target.memory.paged.blocks, int(left * SHARE) // backend.block_bytes(checkpoint.spec))
    if blocks < 1:
        needed = memory.size(checkpoint.weight_bytes)
        raise OutOfMemory(f"{path}: the draft model does not fit beside the target: weights {needed}, free {memory.size(free)}")
    weights = packs.read(checkpoint, backend, target.weight_cache)
    return Runner(checkpoint.spec, weights, backend, blocks, sharing=target.memory.paged.table.sharing, source=path, quant=target.quant)


def weights_like(model: Runner, path: Path) -> Weights:
    """The weights in `path` for a model that was loaded. CheckpointError if they are of another form."""
    backend = model.backend
    checkpoint = loader.inspect(path, name_of(backend.dtype), backend.device, model.quant)
    if checkpoint.spec != model.spec:
        raise CheckpointError(f"{path}: not of the same form as the draft model: {checkpoint.spec}")
    return loader.read(checkpoint, backend)


@cache
def check_vocabulary(target: Path, draft: Path) -> None:
    """CheckpointError if the tokenizers give any token different ids. It names both models and the first difference."""
    if target == draft:
        return
    ours, theirs = (Tokenizer(path).vocabulary.ids() for path in (target, draft))
    if ours == theirs:
        return
    by_id = [{place: token for token, place in vocabulary.items()} for vocabulary in (ours, theirs)]
    places = [place for place in sorted({*by_id[0], *by_id[1]}) if by_id[0].get(place) != by_id[1].get(place)]
    first = places[0]
    raise CheckpointError(
        f"{draft}: the draft model's vocabulary ({len(theirs)} tokens) is not that of the target {target} ({len(ours)} tokens):"
        f" {len(places)} ids differ, the first is {first}: {by_id[1].get(first)!r} instead of {by_id[0].get(first)!r}"
    )
