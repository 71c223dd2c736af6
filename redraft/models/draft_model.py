"""A draft model beside a target's Runner: the same backend and vocabulary, its own weights and memory."""

from __future__ import annotations

from pathlib import Path

from redraft.errors import CheckpointError, InvalidInput, OutOfMemory
from redraft.models import loader, memory, mixers
from redraft.models.runner import Runner
from redraft.models.tokenizer import Tokenizer

SHARE = 0.5  # of what is free after the weights, at most, for the draft model's pool


def load_draft_model(target: Runner, model: str | None) -> Runner:
    """The draft model: `model`, else the target's `draft_model`, else the embedded one beside the embedded target.

    Loaded once for each target, in the target's dtype and form of weights; without numbers beside a target without numbers. Its pool
    has as many pages as the target's, so that whatever the target holds fits, unless memory is short: then a drafter drafts nothing
    where pages lack. Raises InvalidInput without a name, CheckpointError where the vocabularies differ, OutOfMemory with figures.
    """
    asked = model or target.draft_model
    if asked is None and target.source == loader.resolve("embedded"):
        asked = "embedded-draft"
    if asked is None:
        raise InvalidInput("a draft model is needed and none is named: give --draft-model FOLDER, or the method's option model=FOLDER")
    path = loader.resolve(asked)
    if path not in target.draft_models:
        target.draft_models[path] = _load(target, path)
    return target.draft_models[path]


def _load(target: Runner, path: Path) -> Runner:
    backend = target.backend
    dtype = next(name for name, one in loader.DTYPES.items() if one == backend.dtype)
    checkpoint = loader.inspect(path, dtype, backend.device, target.quant)
    if target.source is not None:
        check_vocabulary(target.source, path)
    elif checkpoint.spec.vocab != target.spec.vocab:
        raise CheckpointError(f"{path}: the draft model's vocabulary is {checkpoint.spec.vocab}, the target's {target.spec.vocab}")
    mixers.check(checkpoint.spec, backend)
    if target.weights.head.meta:
        return Runner(checkpoint.spec, loader.meta_weights(checkpoint), backend, 1, source=path)
    free = memory.limits(backend.device)
    left = free - checkpoint.weight_bytes
    blocks = min(target.memory.paged.blocks, int(left * SHARE) // backend.block_bytes(checkpoint.spec))
    if blocks < 1:
        needed = memory.size(checkpoint.weight_bytes)
        raise OutOfMemory(f"{path}: the draft model does not fit beside the target: weights {needed}, free {memory.size(free)}")
    weights = loader.read(checkpoint, backend.device, backend.pack)
    return Runner(checkpoint.spec, weights, backend, blocks, sharing=target.memory.paged.table.sharing, source=path)


def check_vocabulary(target: Path, draft: Path) -> None:
    """CheckpointError unless both tokenizers give every token the same id; it names both and the first difference."""
    if target == draft:
        return
    ours, theirs = (dict(Tokenizer(path).hf.get_vocab()) for path in (target, draft))
    if ours == theirs:
        return
    by_id = [{place: token for token, place in vocabulary.items()} for vocabulary in (ours, theirs)]
    places = [place for place in sorted({*by_id[0], *by_id[1]}) if by_id[0].get(place) != by_id[1].get(place)]
    first = places[0]
    raise CheckpointError(
        f"{draft}: the draft model's vocabulary ({len(theirs)} tokens) is not that of the target {target} ({len(ours)} tokens):"
        f" {len(places)} ids differ, the first is {first}: {by_id[1].get(first)!r} instead of {by_id[0].get(first)!r}"
    )
