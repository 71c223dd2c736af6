"""How much memory is free, and whether weights and pool fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from redraft.config import CacheConfig
from redraft.errors import OutOfMemory
from redraft.models import memory

GIB, MIB = 1 << 30, 1 << 20
CHECKPOINT: Any = SimpleNamespace(path=Path("m"), weight_bytes=2 * GIB, dtype=np.dtype(np.float32))


def blocks(free: int, length: int = 1000, seqs: int = 64, **cache: Any) -> int:
    return memory.pool_blocks(CacheConfig(**cache), CHECKPOINT, MIB, length, max_seqs=seqs, free=free)


def test_pool_is_a_fraction_of_what_is_left() -> None:
    assert blocks(6 * GIB, fraction=0.25) == 1024
    assert blocks(6 * GIB, fraction=0.25, length=32 * 1023) == 1024  # exactly one sequence and a page


def test_pool_is_no_larger_than_can_be_used() -> None:
    assert blocks(600 * GIB, seqs=4) == 5 * 33


def test_explicit_pool() -> None:
    assert blocks(6 * GIB, memory=40 * MIB + 5) == 40
    assert blocks(6 * GIB, seqs=1, memory=400 * MIB) == 400  # the requested size; more than the sequences need, for prefixes


@pytest.mark.parametrize(
    ("free", "options", "figures"),
    [
        (GIB, {}, ["weights do not fit", "2.00 GiB", "1.00 GiB", "float32"]),
        (3 * GIB, {"memory": 2 * GIB}, ["pool of 2.00 GiB does not fit", "weights 2.00 GiB", "left 1.00 GiB"]),
        (3 * GIB, {"memory": 32 * MIB}, ["pool of 32.0 MiB", "max_model_len = 1000", "33.0 MiB"]),
        (3 * GIB, {"length": 32 * 1024, "fraction": 0.5}, ["0.5 of what is left, 512.0 MiB", "max_model_len = 32768", "1.00 GiB"]),
    ],
)
def test_refusals_state_the_figures(free: int, options: dict[str, Any], figures: list[str]) -> None:
    with pytest.raises(OutOfMemory) as caught:
        blocks(free, **options)
    assert all(figure in str(caught.value) for figure in figures), str(caught.value)
    assert "\n" not in str(caught.value)


def test_machine(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert memory._machine(tmp_path / "meminfo") == 2 * MIB
    assert memory._machine(tmp_path / "none") > 100 * MIB
    assert 0 < memory.limits() <= memory._machine(tmp_path / "none")


def group(folder: Path, limit: str, used: int, cached: int, v1: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(f"{limit}\n")
    (folder / ("memory.usage_in_bytes" if v1 else "memory.current")).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{'total_' if v1 else ''}inactive_file {cached}\n")


def test_groups_v2(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("0::/outer/inner\n")
    group(tmp_path / "root" / "outer" / "inner", "max", 10, 5)
    group(tmp_path / "root" / "outer", "1000", 400, 100)
    assert list(memory._cgroups(tmp_path / "root", tmp_path / "self")) == [700]


def test_groups_v1(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("4:cpu:/x\n3:memory:/docker/abc\n1:name=systemd:/x\n")
    group(tmp_path / "root" / "memory", "900", 300, 0, v1=True)  # inside a container the outer path does not exist
    assert list(memory._cgroups(tmp_path / "root", tmp_path / "self")) == [600]


def test_no_groups(tmp_path: Path) -> None:
    assert list(memory._cgroups(tmp_path, tmp_path / "none")) == []
