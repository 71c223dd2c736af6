"""The logits of every family equal those of transformers, however the prompt is cut into steps."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from redraft import registry
from redraft.core.batch import Batch
from redraft.core.plan import Accepted, Work
from redraft.core.taps import Taps
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY
from redraft.models import loader
from redraft.models.runner import Runner
from tests.arrays import PLACED
from tests.models import tiny

PROMPT = torch.randint(3, tiny.V, (45,), generator=torch.Generator().manual_seed(5)).tolist()  # two pages
BACKENDS = {"torch": torch.float32, "numpy": torch.float32, "reference": torch.float64}
SHARE = 1e-4  # of the largest logit


@cache
def expected(name: str) -> torch.Tensor:
    with torch.inference_mode():
        return tiny.model(name)(torch.tensor([PROMPT])).logits[0].double()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def logits(runner: Runner, rows: int) -> torch.Tensor:
    """Logits [len(PROMPT), V], with `rows` tokens a step."""
    seq = sequence(PROMPT, prompt_logprobs=0)
    runner.memory.open(seq)
    out = []
    while seq.pending:
        work = [Work(seq, min(rows, seq.pending))]
        pages = runner.memory.reserve(work, [EMPTY])
        result = runner.forward(Batch.pack(work, [EMPTY], pages), Taps(logits=True))
        assert result.logits is not None
        assert result.argmax.tolist() == result.logits.argmax(-1).tolist()
        out.append(torch.as_tensor(result.logits).double())
        runner.memory.move(runner.memory.commit(work, [Accepted()]))
    runner.memory.free(seq)
    runner.memory.check()
    return torch.cat(out)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    bound = SHARE * want.abs().max().item()
    assert got.shape == want.shape
    assert (got - want).abs().max().item() < bound
    best = want.gather(-1, got.argmax(-1, keepdim=True))[:, 0]  # transformers' logit of the token that we would choose
    assert (want.max(-1).values - best).max().item() < bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_logits_equal_transformers(name: str, backend: str, folder: Path) -> None:
    path = folder / name
    if not path.exists():
        tiny.save(name, path)
    spec, weights = tiny.load(path, dtype=str(BACKENDS[backend]).removeprefix("torch."), backend=PLACED)
    runner = Runner(spec, weights, registry.load(registry.BACKENDS[backend])(BACKENDS[backend]), blocks=4)
    for rows in (len(PROMPT), 7, 1) if backend == "torch" else (len(PROMPT), 7):
        close(logits(runner, rows), expected(name))


def test_the_bound_sees_a_wrong_window(folder: Path) -> None:
    """The must-fail control: one key too many in the window is far outside the bound."""
    path = tiny.save("mistral", folder / "wrong", sliding_window=12)
    spec, weights = tiny.load(path, dtype="float32", backend=PLACED)
    runner = Runner(spec, weights, registry.load(registry.BACKENDS["torch"])(torch.float32), blocks=4)
    with pytest.raises(AssertionError):
        close(logits(runner, 7), expected("mistral"))


SHORT = {"original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "yarn": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
WRITTEN = {  # forms in a config.json: (kind, parameters) -> fields of the config
    "rope_parameters, all within": lambda kind, rope: {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **rope, **SHORT}},
    "rope_parameters, length beside": lambda kind, rope: {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **rope}, **SHORT},
    "rope_parameters, both lengths": lambda kind, rope: {
        "rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **rope, "original_max_position_embeddings": 24}, **SHORT
    },
    "rope_scaling, all within": lambda kind, rope: {"rope_theta": 500.0, "rope_scaling": {"type": kind, **rope, **SHORT}},
    "rope_scaling, length beside": lambda kind, rope: {"rope_theta": 500.0, "rope_scaling": {"rope_type": kind, **rope}, **SHORT},
    "rope_scaling, no length": lambda kind, rope: {"rope_theta": 500.0, "rope_scaling": {"type": kind, **rope}},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("written", WRITTEN)
def test_rope_is_read_as_transformers_reads_it(kind: str, written: str, folder: Path) -> None:
    path = folder / f"{kind}, {written}"
    tiny.save("llama2", path)
    fields = WRITTEN[written](kind, ROPES[kind])
    tiny.edit(path, **{"rope_theta": None, "rope_scaling": None, "rope_parameters": None, "max_position_embeddings": 32, **fields})
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        want = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0].double(), -1)
    checkpoint = loader.inspect(path, "float64")
    runner = Runner(
        checkpoint.spec, loader.read(checkpoint, PLACED), registry.load(registry.BACKENDS["reference"])(torch.float64), blocks=4
    )
    assert (torch.log_softmax(logits(runner, 7), -1) - want).abs().max() < 1e-3
    original = 32 if written.endswith("no length") else 16
    assert checkpoint.context == {"linear": 96, "yarn": 4 * original, "llama3": 32 if original < 32 else 8 * 32}[kind]


def test_the_text_model_beside_a_vision_encoder(folder: Path) -> None:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    ids = {"mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 58, "eoi_token_index": 59}
    config = transformers.Gemma3Config(text_config=tiny.FAMILIES["gemma3"][1], vision_config=vision, **ids)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(float(value.ndim == 1 and name.endswith("weight")) + 0.3 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder / "vision")
    spec, weights = tiny.load(folder / "vision", dtype="float64", backend=PLACED)
    runner = Runner(spec, weights, registry.load(registry.BACKENDS["reference"])(torch.float64), blocks=4)
    with torch.inference_mode():
        close(logits(runner, 7), model(torch.tensor([PROMPT])).logits[0].double())
