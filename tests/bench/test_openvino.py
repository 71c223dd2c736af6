"""The OpenVINO peer compared with transformers on tiny models. Needs openvino, except for the tests of refusals."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft.bench.peers import ir
from redraft.bench.peers.openvino import OpenVino, OpenVinoGenAi
from redraft.bench.peers.peer import Job
from redraft.bench.peers.transformers import Transformers
from redraft.errors import Unsupported
from tests.bench import fakes
from tests.models import tiny

installed = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path / "cache"))


def job(folder: Path, **changes: Any) -> Job:
    given = {"dtype": "auto", "threads": 1, "vocab": tiny.V, "context": 20, "tokens": 12, "prefill": 30, "rows": (1, 5, 9), "repeats": 1}
    return Job(str(folder), **{**given, **changes})


@installed
@pytest.mark.parametrize("family", ["llama3", "llama-yarn", "llama-biases", "smollm", "qwen2", "qwen3-biases", "mistral-full"])
def test_it_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    peer, model = OpenVino(job(tiny.save(family, tmp_path / "model"))), tiny.model(family)
    layers = len(peer.request.query_state()) // 2
    fused = {"FullyConnected": 7 * layers + 1, "ScaledDotProductAttention": layers, "Concatenation": 1}  # no cache is concatenated
    assert fused.items() <= peer.facts["fused"].items() and peer.facts["fused"]["RMS"] >= 2 * layers + 1
    for length in (1, 7, 40):
        prompt = [random.Random(length + i).randrange(tiny.V) for i in range(length)]
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0].argmax(-1).tolist()
        for first in {0, 1, length // 2}:  # in one piece and in two
            peer.request.reset_state()
            found = peer._run(prompt[:first], 0, first) if first else []
            assert [*found, *(peer._run(prompt[first:], first, length - first) if first < length else [])] == expected
        peer.request.reset_state()
        assert peer._run(prompt, 0, 1) == expected[-1:]


@installed
def test_what_is_measured_is_what_is_asked(tmp_path: Path) -> None:
    peer, model = OpenVino(job(tiny.save("llama3", tmp_path / "model"))), tiny.model("llama3")
    said = peer.decode()
    tokens = peer.job.prompt(20)
    with torch.inference_mode():
        for _ in range(13):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert said["tokens"] == tokens[20:] and len(said["seconds"]) == 12 and len(set(said["tokens"])) > 1
    assert peer.decode()["tokens"] == said["tokens"]  # nothing is left of the previous turn
    assert set(peer.steps()["seconds"]) == {1, 5, 9} and peer.prefill()["seconds"] > 0
    assert (peer.facts["dtype"], peer.facts["inference_num_threads"]) == ("float32", "1")


@installed
@pytest.mark.parametrize("context", [1, 20])
def test_a_step_stands_behind_the_context_alone(context: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer, model = OpenVino(job(tiny.save("llama3", tmp_path / "model"), context=context)), tiny.model("llama3")
    tokens, answers, run = peer.job.prompt(context + 9), [], peer._run

    def noted(*given: Any) -> list[int]:
        answers.append(run(*given))
        return answers[-1]

    monkeypatch.setattr(peer, "_run", noted)
    peer.steps()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].argmax(-1).tolist()[context:]
    steps = answers[-1::-2][:6][::-1]  # before each of them its context's last token
    assert steps == [expected[:rows] for rows in (1, 1, 5, 5, 9, 9)]


@pytest.mark.skipif(importlib.util.find_spec("openvino_genai") is None, reason="openvino-genai is not installed")
@pytest.mark.parametrize("mode", ["plain", "prompt lookup", "assistant"])
def test_its_pipelines_generate_what_transformers_generates(mode: str, tmp_path: Path) -> None:
    folder = fakes.checkpoint(tmp_path / "model")
    given = {"options": {"assistant": str(folder)}, "stop": (5,)}
    expected = Transformers(job(folder, **given)).generate("plain", [7, 8, 9, 7, 8], 12)["tokens"]
    peer = OpenVinoGenAi(job(folder, **given))
    for _ in range(2):  # nothing is left of the previous text
        assert peer.generate(mode, [7, 8, 9, 7, 8], 12)["tokens"] == expected
    assert len(set(expected)) > 1


@installed
def test_it_is_converted_once(tmp_path: Path) -> None:
    folder = tiny.saved("qwen2", tmp_path / "model", dtype="bfloat16")
    file = ir.converted(folder, "auto")
    before = file.stat().st_mtime_ns
    assert ir.converted(folder, "auto") == file and file.stat().st_mtime_ns == before
    assert (
        ir.converted(folder, "auto", genai=True).parent != file.parent
        and ir.converted(folder, "float32") != file
        and len(list((tmp_path / "cache/openvino").iterdir())) == 3
    )
    tiny.saved("qwen2", folder, seed=1, dtype="bfloat16")
    assert ir.converted(folder, "auto") != file


@pytest.mark.parametrize("family", ["mistral", "mixtral", "gpt2"])
def test_what_is_not_converted_is_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=f"no OpenVINO graph for this {family}"):
        ir.converted(tiny.save(family, tmp_path / "model"), "auto")
