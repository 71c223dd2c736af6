"""draft=auto chooses a drafter that pays off on this machine, and explicit options are kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from redraft import LLM
from redraft.config import EngineConfig
from redraft.draft.default import resolved
from redraft.ops import library
from tests.checkpoints import tiny_llama


def machine(monkeypatch: pytest.MonkeyPatch, isa: str | None) -> None:
    monkeypatch.setattr(library, "load", lambda: None if isa is None else SimpleNamespace(isa=isa))


@pytest.mark.parametrize(
    ("isa", "device", "expected"),
    [
        ("avx2", "cpu", ("copyspec", 4)),
        ("avx512_bf16", "cpu", ("copyspec", 4)),
        (None, "cpu", ("copyspec", 4)),
        ("amx", "cpu", ("token-recycling", 16)),
        ("avx2", "cuda", ("token-recycling", 16)),
    ],
)
def test_auto_depends_on_the_machine(monkeypatch: pytest.MonkeyPatch, isa: str | None, device: str, expected: tuple[str, int]) -> None:
    machine(monkeypatch, isa)
    found = resolved(EngineConfig.of(draft="auto", token_budget=99), torch.device(device))
    assert (found.draft, found.schedule.draft_rows, found.schedule.token_budget) == (*expected, 99)


@pytest.mark.parametrize("given", [{"draft": "token-recycling"}, {"draft": "none"}, {"draft": "copyspec", "draft_rows": 16}])
def test_a_given_drafter_stays(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> None:
    machine(monkeypatch, "avx2")
    config = EngineConfig.of(**given)
    assert resolved(config, torch.device("cpu")) is config


@pytest.mark.parametrize("rows", [0, 7, 16])
def test_given_rows_stay(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    machine(monkeypatch, "avx2")
    found = resolved(EngineConfig.of(draft="auto", draft_rows=rows), torch.device("cpu"))
    assert (found.draft, found.schedule.draft_rows) == ("copyspec", rows)


def test_an_engine_has_the_resolved_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(tiny_llama(tmp_path / "llama")), backend="torch", draft="auto", cache_memory=1 << 20)
    machine(monkeypatch, "avx2")
    plain = llm.sibling(draft="none", draft_rows=9)
    sibling = plain.sibling(draft="auto")
    assert (sibling.config.draft, sibling.config.schedule.draft_rows) == ("copyspec", 9)
    assert llm.config.draft in ("copyspec", "token-recycling")
    assert llm.engine.scheduler.draft_rows == llm.config.schedule.draft_rows == {"copyspec": 4, "token-recycling": 16}[llm.config.draft]  # type: ignore[attr-defined]
