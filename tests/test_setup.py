"""Which backend computes, and what is said where PyTorch or the compiled kernels are missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from redraft import registry, setup
from redraft.config import EngineConfig
from redraft.errors import InvalidInput, Unsupported
from redraft.ops import library
from redraft.setup import Setup

EXTRA = r"it needs PyTorch, which is not installed: pip install 'redraft\[torch\]'$"


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed."""
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("torch_ops", "torch_pool", "torch_arrays", "reference"):
        monkeypatch.delitem(sys.modules, f"redraft.ops.{name}", raising=False)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_load", lambda: (None, "they were not compiled"))


def made(**options: Any) -> Setup:
    return Setup.of(EngineConfig.of(model="embedded", **{"device": "cpu", "cache_memory": 1 << 22, "max_model_len": 64, **options}))


@pytest.mark.parametrize("options", [{"backend": "torch"}, {"backend": "reference"}, {"dtype": "float16"}, {"device": "cuda"}], ids=str)
def test_what_needs_pytorch_names_the_extra(options: dict[str, str], no_torch: None) -> None:
    ((field, value),) = options.items()
    with pytest.raises(Unsupported, match=f"^{field} = '{value}': {EXTRA}"):
        made(**options)


@pytest.mark.skipif(bool(library.why_not()), reason="no native kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_kernels_serve_without_a_word(dtype: str, no_torch: None, caplog: pytest.LogCaptureFixture) -> None:
    assert made(dtype=dtype).backend.name == "native"
    assert not caplog.records


def test_numpy_serves_float64_without_pytorch(no_torch: None) -> None:
    assert made(dtype="float64").backend.name == "numpy"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_kernels_numpy_serves_and_says_that_it_is_slow(
    dtype: str, no_torch: None, no_kernels: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert made(dtype=dtype).backend.name == "numpy"
    (line,) = caplog.messages
    assert " ".join(line.split()) == "backend 'numpy' computes, which is slow: they were not compiled"
    caplog.clear()
    made(backend="numpy")
    assert not caplog.records, "it was chosen"


@pytest.mark.torch
def test_without_kernels_pytorch_serves_where_it_is_installed(no_kernels: None, caplog: pytest.LogCaptureFixture) -> None:
    assert made(dtype="float32").backend.name == "torch"
    (line,) = caplog.messages
    assert "backend 'torch' computes, which is slow: they were not compiled" in " ".join(line.split())


def test_a_gpu_that_nothing_can_use_is_named(
    no_torch: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(setup, "GPUS", (str(tmp_path),))
    assert made(device="auto").backend.device == "cpu"
    (line,) = caplog.messages
    assert " ".join(line.split()).startswith("device 'cpu' computes. There may be a GPU here, but it needs PyTorch")
    monkeypatch.setattr(setup, "GPUS", ())
    caplog.clear()
    made(device="auto")
    assert not caplog.records


def test_unknown_names_are_named() -> None:
    with pytest.raises(InvalidInput, match=r"^no backend 'torhc': did you mean 'torch'\?$"):
        made(backend="torhc")
    with pytest.raises(InvalidInput, match=r"^device = 'tpu': auto, cpu, cuda or cuda:N is allowed$"):
        made(device="tpu")
    assert set(registry.BACKENDS) == {"native", "numpy", "reference", "torch"}
