"""The parts of a checkpoint are found by trial: operations that the native backend passes on to NumPy are noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from redraft import registry
from redraft.bench import parts
from redraft.models import loader
from redraft.ops import library
from redraft.ops.native import NativeOps
from tests.models import tiny

native = pytest.mark.skipif(not library.PATH.exists() or library.load() is None, reason="no native library")


def found(path: Path, dtype: str = "float32") -> dict[str, parts.Part]:
    return {part.name: part for part in parts.parts(loader.inspect(path, dtype))}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two policies and no quantizer."""
    for seam in ("quant", *parts.SEAMS):
        kept = {name: one for name, one in registry.METHODS[seam].items() if name in ("int8", "double-sparsity") and seam != "quant"}
        monkeypatch.setitem(registry.METHODS, seam, kept)


@native
@pytest.mark.usefixtures("few")
def test_layers_and_policies_are_named(tmp_path: Path) -> None:
    got = found(tiny.save("mixtral", tmp_path))
    assert {"embedding", "norms", "linear layers", "rotary positions", "attention", "experts", "head"} <= set(got)
    assert "MLP" not in got
    assert got["attention"].backend == got["experts"].backend == got["codec: int8"].backend == "native"
    assert "experts" not in got["read: double-sparsity"].why, "one operation at a time they are native too"
    assert got["read: double-sparsity"].backend != "not tried", "it was calibrated for the trial"


@native
@pytest.mark.usefixtures("few")
def test_what_the_backend_passes_on_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.save("qwen2-window", tmp_path)
    assert {part.backend for name, part in found(checkpoint).items() if name.startswith(("norms", "attention"))} == {"native"}

    def norm(self: NativeOps, *arguments: Any) -> Tensor:
        return super(NativeOps, self).norm(*arguments)

    monkeypatch.setattr(NativeOps, "norm", norm)
    monkeypatch.setattr(NativeOps, "run", lambda *_: None)
    monkeypatch.setattr(NativeOps, "forward", lambda *_: None)
    got = found(checkpoint)
    assert (got["norms (2 layers from 0)"].backend, got["norms (layer 2)"].backend) == ("numpy", "numpy")
    assert got["attention (layer 2)"].backend == "native" and "head (layer 2)" not in got


@pytest.mark.usefixtures("few")
def test_a_model_that_no_kernel_serves_is_one_part(tmp_path: Path) -> None:
    (part,) = found(tiny.save("llama2", tmp_path), "float64").values()
    assert (part.name, part.backend) == ("all of it", "torch") and "float64" in part.why
