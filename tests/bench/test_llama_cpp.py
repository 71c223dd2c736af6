"""The class `Llama` compared with transformers on a tiny model. Needs llama-cpp-python and gguf."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from redraft.bench.peers.llama_cpp import LlamaCppPython
from redraft.bench.peers.peer import Job
from tests.bench import fakes
from tests.models import tiny

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "gguf")), reason="llama-cpp-python or gguf is not installed"
)


@pytest.mark.torch
@pytest.mark.parametrize("mode", ["plain", "prompt lookup"])
def test_it_generates_what_transformers_generates(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from redraft.bench.peers.transformers import Transformers

    monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path / "cache"))
    job = Job(str(fakes.checkpoint(tmp_path / "model")), "float32", 1, tiny.V, 20, 12, 20, (1,), stop=(5,))
    expected = [Transformers(job).generate("plain", prompt, 12)["tokens"] for prompt in ([7, 8, 9, 7, 8], [7, 8, 11])]
    peer = LlamaCppPython(job)
    for _ in range(2):  # nothing is left of the previous text
        assert [peer.generate(mode, prompt, 12)["tokens"] for prompt in ([7, 8, 9, 7, 8], [7, 8, 11])] == expected
    assert len(set(expected[0])) > 1 and peer.modes[mode].n_threads == 1
