"""What a configuration and a checkpoint's headers determine, before any weight is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from redraft import registry
from redraft.config import AUTO, EngineConfig
from redraft.core.spec import ModelSpec
from redraft.draft.drafter import Drafter
from redraft.errors import CheckpointError, InvalidInput, Unsupported, shown
from redraft.models import loader, memory, mixers
from redraft.ops import library
from redraft.ops.backend import Backend, Feature
from redraft.sched.scheduler import Scheduler


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
        scheduler = scheduler_of(config, device)
        checkpoint = _checkpoint(config, device)
        backend = _backend(config, checkpoint, device)
        if config.model.quant == AUTO:
            name = _as_stored(checkpoint, backend)
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
    if chosen not in ("auto", *registry.BACKENDS):
        raise registry.unknown("backend", chosen, ("auto", *registry.BACKENDS))
    path = loader.resolve(config.model.model)
    if config.draft_model is not None:
        loader.resolve(config.draft_model)
    dtype = "float64" if chosen == "reference" else config.model.dtype
    found = loader.inspect(path, dtype, device, quant, config.model.max_model_len)
    if found.keeps and not found.stores_codes():
        raise Unsupported(f"{path}: quant = {config.model.quant!r}: its matrices are not stored in a quantized form that kernels multiply")
    return found


def _as_stored(checkpoint: loader.Checkpoint, backend: Backend) -> str | None:
    """The quantization that keeps weights as they are stored, if they are quantized and products with them are as fast as others."""
    if Feature.GROUPED not in backend.features or not checkpoint.stores_codes():
        return None
    return next((name for name in registry.METHODS["quant"] if getattr(registry.method("quant", name), "keeps", False)), None)


def _backend(config: EngineConfig, checkpoint: loader.Checkpoint, device: str) -> Backend:
    """The backend that `config` names. "auto" is native if it serves both models, else torch."""
    chosen = config.model.backend
    if chosen == "auto":
        specs = [checkpoint.spec, *_draft_spec(config, device)]
        chosen = "native" if all(library.serves(checkpoint.dtype, device, spec)[0] == "native" for spec in specs) else "torch"
    backend: Backend = registry.load(registry.BACKENDS[chosen])(checkpoint.dtype, device)
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


GPUS = (
    "/dev/nvidiactl",
    "/dev/nvmap",
    "/dev/kfd",
    "/dev/dxg",
)  # there if this process may use a GPU: importing PyTorch to ask it takes a second


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if any(Path(gpu).exists() for gpu in GPUS) and _has_cuda() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise InvalidInput(f"device = {shown(name)}: auto, cpu, cuda or cuda:N is allowed")
    if name != "cpu" and not _has_cuda():
        raise InvalidInput(f"device = {shown(name)}: PyTorch finds no CUDA device here")
    return name


def _has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
