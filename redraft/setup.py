"""What a configuration and a checkpoint's headers determine, before any weight is read."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from redraft import registry
from redraft.columns import fold, width
from redraft.config import AUTO, EngineConfig
from redraft.core.spec import ModelSpec
from redraft.draft.drafter import Drafter
from redraft.engine import cache_policy
from redraft.errors import CheckpointError, InvalidInput, Unsupported, shown
from redraft.models import loader, memory, mixers
from redraft.ops import library
from redraft.ops.backend import Backend, Feature
from redraft.sched.scheduler import Scheduler

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """The parts of an engine and the size of its pool. blocks: the number of blocks of the pool."""

    config: EngineConfig
    drafter: Drafter
    scheduler: Scheduler
    checkpoint: loader.Checkpoint
    backend: Backend
    max_model_len: int
    blocks: int

    @classmethod
    def of(cls, config: EngineConfig) -> Setup:
        """Checks the names first, then the checkpoint, then the sizes. UnknownMethod, InvalidInput, CheckpointError, OutOfMemory or
        Unsupported, one line each."""
        device = _device(config.model.device)
        drafter = registry.create("draft", config.draft)
        registry.create("verify", config.verify)
        if config.cache.policy is not None:
            cache_policy.named(config.cache.policy)
        scheduler = scheduler_of(config, device)
        checkpoint = _checkpoint(config, device)
        backend = _backend(config, checkpoint, device)
        if config.model.quant == AUTO:
            name = as_stored(checkpoint, backend.features)
            checkpoint = replace(checkpoint, quant=registry.create("quant", name) if name else None)
            config = config.but(model=config.model.but(quant=name))
        mixers.check(checkpoint.spec, backend)
        max_model_len = config.model.max_model_len or checkpoint.context
        if max_model_len > checkpoint.context:
            raise InvalidInput(f"max_model_len = {max_model_len}: the checkpoint's context is {checkpoint.context}")
        block_bytes = backend.block_bytes(checkpoint.spec)
        free, max_seqs = memory.limits(device), scheduler.max_seqs
        blocks = memory.pool_blocks(config.cache, checkpoint, block_bytes, max_model_len, max_seqs=max_seqs, free=free)
        return cls(config, drafter, scheduler, checkpoint, backend, max_model_len, blocks)


def scheduler_of(config: EngineConfig, device: str) -> Scheduler:
    """The scheduler with the budgets of `config`. Budgets that are not given follow from the device."""
    schedule = config.schedule
    total = schedule.draft_total if schedule.draft_total is not None else 128 if device.startswith("cuda") else 32
    given = "max_seqs" in schedule.model_fields_set
    max_seqs = schedule.max_seqs if given else min(schedule.max_seqs, schedule.token_budget)
    budgets = {"token_budget": schedule.token_budget, "max_seqs": max_seqs, "draft_rows": schedule.draft_rows}
    return cast(Scheduler, registry.create("sched", schedule.scheduler, draft_total=total, **budgets))


def _checkpoint(config: EngineConfig, device: str) -> loader.Checkpoint:
    """The checkpoint's headers. The draft model's path is checked even if no drafter uses it."""
    quant = None if config.model.quant in (None, AUTO) else registry.create("quant", config.model.quant)
    chosen = config.model.backend
    if chosen != "auto":
        registry.backend(chosen)
    path = loader.resolve(config.model.model)
    if config.draft_model is not None:
        loader.resolve(config.draft_model)
    dtype = "float64" if chosen == "reference" else config.model.dtype
    found = loader.inspect(path, dtype, device, quant, config.model.max_model_len)
    if found.keeps and not found.stores_codes():
        raise Unsupported(f"{path}: quant = {config.model.quant!r}: its matrices are not stored in a quantized form that kernels multiply")
    return found


def as_stored(checkpoint: loader.Checkpoint, features: Set[Feature]) -> str | None:
    """The quantization that keeps weights as they are stored, if they are quantized and a backend with these features multiplies them as
    fast as others."""
    if Feature.GROUPED not in features or not checkpoint.stores_codes():
        return None
    return next((name for name in registry.METHODS["quant"] if getattr(registry.method("quant", name), "keeps", False)), None)


def _backend(config: EngineConfig, checkpoint: loader.Checkpoint, device: str) -> Backend:
    """The backend that `config` names. "auto" is the native one if it serves both models."""
    chosen = config.model.backend
    if chosen == "auto":
        served = [library.serves(checkpoint.dtype, device, spec) for spec in (checkpoint.spec, *_draft_spec(config, device))]
        chosen, why = next((other for other in served if other[0] != "native"), served[0])
        if chosen == "torch" and importlib.util.find_spec("torch") is None:
            raise Unsupported(f"dtype = {config.model.dtype!r}: {registry.NEEDS_TORCH}")
        if device == "cpu" and library.load() is None:
            _warn(f"backend {chosen!r} computes, which is slow: {why}")
    backend: Backend = registry.backend(chosen)(checkpoint.dtype, device)
    if config.model.threads is not None:
        backend.use_threads(config.model.threads)
    return backend


def _draft_spec(config: EngineConfig, device: str) -> list[ModelSpec]:
    """The draft model's spec; empty without a draft model. Errors in its files are raised later, when it is loaded."""
    if config.draft_model is None:
        return []
    try:
        return [loader.inspect(loader.resolve(config.draft_model), config.model.dtype, device).spec]
    except (CheckpointError, Unsupported):
        return []


def _warn(line: str) -> None:
    log.warning("%s", "\n".join(fold(line, width())))


GPUS = (
    "/dev/nvidiactl",
    "/dev/nvmap",
    "/dev/kfd",
    "/dev/dxg",
)  # there if this process may use a GPU: importing PyTorch to ask it takes a second


def _device(name: str) -> str:
    installed = importlib.util.find_spec("torch") is not None
    if name == "auto":
        if not any(Path(gpu).exists() for gpu in GPUS):
            return "cpu"
        if not installed:
            _warn(f"device 'cpu' computes. There may be a GPU here, but {registry.NEEDS_TORCH}")
        return "cuda" if installed and _has_cuda() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise InvalidInput(f"device = {shown(name)}: auto, cpu, cuda or cuda:N is allowed")
    if name != "cpu" and not installed:
        raise Unsupported(f"device = {shown(name)}: {registry.NEEDS_TORCH}")
    if name != "cpu" and not _has_cuda():
        raise InvalidInput(f"device = {shown(name)}: PyTorch finds no CUDA device here")
    return name


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
