from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from redraft import registry
from redraft.card import Card, Guarantee
from redraft.core.taps import Taps
from redraft.draft.none import NoDraft
from redraft.models import loader
from tests.cli.conftest import Ran
from tests.contracts.identity import complete


@dataclass(frozen=True)
class Spy(NoDraft):
    """When opened, it inspects layers of the model."""

    card: ClassVar[Card] = Card("Spy", "Nobody, 2026", Guarantee.LOSSY)

    def open(self, runner: Any, sampler: Any) -> Spy:
        found = Spy()
        object.__setattr__(found, "taps", Taps(hidden=frozenset({0, len(runner.spec.layers) - 2})))
        return found


def below(out: str, call: str) -> str:
    """The lines under the first line of the step that has `call`."""
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if call in line)
    indent = len(lines[at]) - len(lines[at].lstrip())
    found = []
    for line in lines[at + 1 :]:
        if len(line) - len(line.lstrip()) <= indent + 4:
            break
        found.append(line.strip())
    return "\n".join(found)


def test_every_part_stands_under_its_line(redraft: Callable[..., Ran], tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("explain reads headers only")

    monkeypatch.setattr(loader, "read", read)
    options = ["--draft", "token-recycling:k=5", "--scheduler", "fcfs", "--draft-total", "24", "--cache-memory", "1000000"]
    code, out, _ = redraft("explain", tiny, "--dtype", "float32", *options)
    assert code == 0
    assert "weights 103 KiB" in out  # 4 bytes for each of 26,424
    assert "guarantee: same-text, the weakest of the parts" in out
    assert below(out, "self.scheduler.plan(").startswith("scheduler: fcfs, First come, first served; guarantee same-text\n")
    assert "draft_rows=16, draft_total=24" in below(out, "self.scheduler.plan(")
    assert "Orca" in below(out, "self.scheduler.plan(")
    assert "k=5" in below(out, "self.drafter.propose(")
    assert "arXiv 2408.08696" in below(out, "self.drafter.propose(")
    assert re.match(r"cache: \d+ blocks of 32 tokens, prefixes shared across requests", below(out, "self.memory.reserve("))
    runner = below(out, "self.runner.forward(")
    assert "segments of layers: 0..2\n" in runner
    assert "sampler requests nothing beyond the argmax" in runner
    assert "drafter token-recycling:k=5 requests the 5 likeliest tokens of every row" in runner
    assert "sampler: greedy; processors: none" in below(out, "self.sampler.distribution(")
    assert "verifier: coupled" in below(out, "self.verifier.accept(")
    assert "arXiv 2305.09781" in below(out, "self.verifier.accept(")


def test_sampling_options_change_what_is_requested(redraft: Callable[..., Ran], tiny: str) -> None:
    _, out, _ = redraft("explain", tiny, "--temperature", "0.8", "--top-p", "0.9", "--bad-words", "x")
    assert "sampler requests logits" in below(out, "self.runner.forward(")
    assert "processors: BadWords, Temperature, TopP" in below(out, "self.sampler.distribution(")


def test_controls_stand_beside_the_processors(redraft: Callable[..., Ran], tiny: str) -> None:
    _, out, _ = redraft("explain", tiny, "--control", "momentum:k=4", "--temperature", "0")
    sampler = below(out, "self.sampler.distribution(")
    assert (
        "processors: FilteredControls" in sampler
        and "control: momentum, Momentum decoding; guarantee lossy" in sampler
        and "k=4" in sampler
    )
    assert "guarantee: lossy, the weakest of the parts" in out


def test_taps_and_the_weakest_guarantee_come_from_the_parts(
    redraft: Callable[..., Ran], tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.METHODS["draft"], "spy", f"{__name__}:Spy")
    _, out, _ = redraft("explain", tiny, "--draft", "spy")
    assert "guarantee: lossy, the weakest of the parts" in out
    assert "segments of layers: 0..0, 1..1, 2..2" in below(out, "self.runner.forward(")
    assert "drafter spy requests hidden states after layers 0, 1" in below(out, "self.runner.forward(")


NEED_FILES = {"a2ats", "compresskv", "double-sparsity", "duo", "first", "judge", "mikv", "razor", "stored", "think"}
CHOICES = [(seam, name) for seam in ("draft", "verify", "keep", "codec", "read", "depth", "quant") for name in registry.METHODS[seam]]
CHOICES += [("draft", "union:parts=copyspec+token-recycling"), ("draft", "auto")]


@pytest.mark.parametrize("columns", ["80", None])
@pytest.mark.parametrize(("seam", "name"), [one for one in CHOICES if one[1] not in NEED_FILES and complete(*one)])
def test_everything_fits_80_columns(
    redraft: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, seam: str, name: str, columns: str | None
) -> None:
    if columns is None:
        monkeypatch.delenv("COLUMNS")
    else:
        monkeypatch.setenv("COLUMNS", columns)
    code, out, err = redraft("explain", f"--{seam}", name, "--cache-memory", "10000000")
    assert code == 0, err
    assert registry.parse(name)[0] in out or name == "auto"
    assert [line for line in out.splitlines() if len(line) > 80] == []


def test_a_cache_policy_for_all_requests_is_among_the_parts(redraft: Callable[..., Ran], tiny: str) -> None:
    _, chosen, _ = redraft("explain", tiny, "--keep", "streaming-llm:recent=8")
    _, for_all, _ = redraft("explain", tiny, "--cache-policy", "keep=streaming-llm:recent=8")
    _, left, _ = redraft("explain", tiny, "--cache-policy", "keep=streaming-llm:recent=8", "--keep", "none")
    assert for_all == chosen and "guarantee: lossy" in chosen and "policies: none" in left


def test_the_default_drafter_is_auto(redraft: Callable[..., Ran], tiny: str) -> None:
    _, out, _ = redraft("explain", tiny, "--cache-memory", "1000000")
    assert "drafter: auto, " in out
