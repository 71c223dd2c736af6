"""Measurements on a machine without PyTorch."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.bench import against, decode, ops, report, shapes
from redraft.bench.compare import CompareOptions
from redraft.bench.decode import DecodeOptions
from redraft.bench.ops import OpsOptions
from redraft.bench.peers import limits
from redraft.config import SamplingParams
from redraft.errors import Unsupported
from redraft.ops import library, pytorch
from redraft.ops.arrays import DTYPES
from tests.test_llm import MISSING


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were neither installed nor loaded."""
    found, version = decode.importlib.util.find_spec, metadata.version

    def other(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", other)
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name, *more: None if name == "torch" else found(name, *more))
    monkeypatch.delitem(sys.modules, "torch", raising=False)


PEERS = """
from redraft.bench.peers.limits import Limits
from redraft.bench.peers.peer import Job
from redraft.bench.peers.redraft import Redraft

given = {"dtype": "auto", "threads": 1, "vocab": 4096, "context": 8, "tokens": 4, "prefill": 8, "rows": (1, 2), "repeats": 1}
own = Redraft(Job("embedded", **given))
assert len(own.decode()["tokens"]) == 5 and own.prefill()["seconds"] > 0 and set(own.steps()["seconds"]) == {1, 2}
assert own.facts["torch_threads"] is own.facts["torch_isa"] is None
machine = Limits(Job("embedded", **given, options={"bytes": 1 << 16, "side": 8}))
assert machine.bandwidth()["bytes_per_second"] > 0 and machine.peak()["flops_per_second"]["float32"] > 0
"""


@pytest.mark.skipif(bool(library.why_not()), reason="no native kernels")
def test_the_engine_and_the_limits_are_measured() -> None:
    done = subprocess.run([sys.executable, "-c", MISSING + PEERS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("absent")
def test_transformers_is_missing_without_it() -> None:
    pip = {"transformers": "transformers torch"}
    engines, _, missing = decode._engines(DecodeOptions(against=("transformers",)))
    assert [engine.name for engine in engines] == ["redraft"] and missing == pip
    options = CompareOptions(("copyspec",), SamplingParams(temperature=0), 1, 1)
    assert against._rows(options, against.Against(("transformers",)), {})[1] == pip


def test_its_backend_is_measured_only_if_it_is_installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch, "version", lambda: "2.5")
    assert decode.own_engines({}, []) == ({}, {"backend": "torch"})
    monkeypatch.undo()
    request.getfixturevalue("absent")
    assert decode.own_engines({}, []) == ({},)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "redraft.ops.torch_ops", raising=False)
    found, refused = ops._backends(OpsOptions(backends=("numpy",), quants=()), DTYPES["float32"])
    assert list(found) == ["numpy"] and not refused
    with pytest.raises(Unsupported, match=f"^backend = 'torch': {re.escape(registry.NEEDS_TORCH)}$"):
        OpsOptions(backends=("numpy", "torch"))
    found, refused = ops._backends(OpsOptions(), DTYPES["float32"])
    assert "torch" not in found and refused["torch"].endswith(registry.NEEDS_TORCH)


@pytest.mark.usefixtures("absent")
def test_its_facts_are_null() -> None:
    assert pytorch.facts() == {"torch": None, "torch_threads": None, "torch_isa": None}
    found = report.hardware()
    assert found["torch"] is found["threads"] is None and found["cores"] > 0
    assert report.beside_pytorch(found) == "" and report.beside_pytorch({"torch": "2.5"}) == ", PyTorch 2.5"


def test_a_gpu_is_asked_for_only_if_a_device_file_exists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pytorch, "gpu", lambda: "a GPU")
    monkeypatch.setattr(report, "GPUS", (str(tmp_path / "none"),))
    assert report.hardware()["gpu"] is None
    monkeypatch.setattr(report, "GPUS", (str(tmp_path / "none"), str(tmp_path)))
    assert report.hardware()["gpu"] == "a GPU"


def test_limits_without_kernels_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_load", lambda: (None, "it was not compiled"))
    found = limits.limits(1 << 16, 8)
    assert (found["how"], found["isa"]) == ("NumPy", None)
    assert found["bytes_per_second"] > 0 and found["flops_per_second"].keys() == {"float32"}
    assert found["flops_per_second"]["float32"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_are_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    def drawn(seed: int) -> Any:
        return shapes.normal(np.random.default_rng(seed), (50, 41), DTYPES[dtype], 3, 0.5)

    whole, other = drawn(7), drawn(8)
    monkeypatch.setattr(shapes, "BLOCK", 13)
    assert whole.dtype == DTYPES[dtype] and (drawn(7) == whole).all() and (other != whole).any()
    assert abs(float(whole.astype(np.float64).mean()) - 3) < 0.05 and abs(float(whole.astype(np.float64).std()) - 0.5) < 0.05
