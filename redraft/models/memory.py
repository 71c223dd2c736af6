"""How much memory is free, and how large the pool may be. This is decided before weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redraft.config import CacheConfig
from redraft.errors import OutOfMemory
from redraft.models.loader import Checkpoint


def limits(device: Any = "cpu") -> int:
    """Bytes that this process may still use on `device`: what the machine has free, or less if a container (cgroup v2 or v1) allows
    less."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, min([_machine(), *_cgroups()]))


def pool_blocks(
    config: CacheConfig,
    checkpoint: Checkpoint,
    block_bytes: int,
    max_model_len: int,
    *,
    max_seqs: int,
    free: int,
    page: int = 32,
) -> int:
    """The number of blocks of `block_bytes` in the pool, given `free` bytes before loading (see `limits`).

    The pool is `config.memory`, or `config.fraction` of what is free after the weights, but at most what `max_seqs` sequences of
    `max_model_len` tokens can fill, and one more, because a text that evicts holds what stays twice for a moment. OutOfMemory if the
    weights do not fit, if the requested pool does not fit as well, or if the pool cannot hold one sequence of max_model_len tokens and a
    page for its draft.
    """
    weights = checkpoint.weight_bytes
    held = f"weights {size(weights)} ({checkpoint.dtype}), free {size(free)}"
    if weights > free:
        raise OutOfMemory(f"{checkpoint.path}: the weights do not fit: {held}")
    one = -(-max_model_len // page) + 1
    if config.memory is None:
        blocks = min(int((free - weights) * config.fraction) // block_bytes, (max_seqs + 1) * one)
        pool = f"{config.fraction:g} of what is left, {size(int((free - weights) * config.fraction))},"
    else:
        blocks = config.memory // block_bytes
        pool = f"the cache pool of {size(config.memory)}"
        if config.memory > free - weights:
            raise OutOfMemory(f"{checkpoint.path}: {pool} does not fit: {held}, left {size(free - weights)}")
    if blocks < one:
        raise OutOfMemory(
            f"{checkpoint.path}: {pool} cannot hold one sequence of max_model_len = {max_model_len} tokens, which takes"
            f" {size(one * block_bytes)}: {held}"
        )
    return blocks


def size(amount: int) -> str:
    """Bytes with a unit: '1.50 GiB', '3.2 MiB', '12 KiB'."""
    if amount >= 1 << 30:
        return f"{amount / (1 << 30):.2f} GiB"
    return f"{amount / (1 << 20):.1f} MiB" if amount >= 1 << 20 else f"{amount / (1 << 10):.0f} KiB"


def _machine(meminfo: Path = Path("/proc/meminfo")) -> int:
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # macOS has no simple figure for free memory, and can page out memory that other processes do not use
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroups(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes left in each control group of this process. Cached file pages count as free, because the kernel can drop them."""
    if not membership.exists():
        return
    for line in membership.read_text().splitlines():
        _, controllers, inside = line.split(":", 2)
        if not controllers:
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = base / inside.lstrip("/")
        for folder in [own, *own.parents]:
            if not folder.is_relative_to(base):
                break
            yield from _left(folder, *names)


def _left(folder: Path, limit: str, usage: str, cached: str) -> Iterator[int]:
    try:
        maximum, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # the root group has no limit; in a container the path outside may not exist
        return
    if maximum != "max":
        yield int(maximum) - used + int(stat.get(cached, 0))
