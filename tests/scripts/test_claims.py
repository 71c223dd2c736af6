"""The short form of scripts/prove claims: verdicts, the registry of claims, and the page that quotes the runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from redraft import registry
from scripts.claims import claim as claims
from scripts.claims.claim import CONFIRMED, REFUTED, UNSEEN, Claim, Found, Result
from scripts.claims.registry import NO_CLAIM, chosen, every
from scripts.proofs.claims import BEGIN, END

PAGE = Path(__file__).resolve().parents[2] / "docs" / "claims.md"


def synthetic(border: float = 0.0, *, below: bool = False) -> Claim:
    return Claim("some", ("draft=some",), "it helps", "toy", "gain", lambda lab: Found([]), border, below)


def verdict(values: list[float], border: float = 0.0, *, below: bool = False) -> str:
    claim = synthetic(border, below=below)
    found = Result.of(claim, Found(values), 0.0, "")
    return claim.verdict(found.interval, found.samples)


def test_the_whole_interval_must_be_on_one_side_of_the_border() -> None:
    assert verdict([0.1, 0.2, 0.3, 0.2, 0.1]) == CONFIRMED
    assert verdict([-0.1, -0.2, -0.3, -0.2, -0.1]) == REFUTED
    assert verdict([-0.3, 0.2, 0.3, -0.2, 0.1]) == UNSEEN
    assert verdict([0.1, 0.2, 0.3, 0.2, 0.1], border=0.15) == UNSEEN
    assert verdict([1.0] * 8, border=0.99) == CONFIRMED


def test_a_claim_may_expect_less_than_its_border() -> None:
    assert verdict([0.1, 0.2, 0.3, 0.2, 0.1], border=0.5, below=True) == CONFIRMED
    assert verdict([0.6, 0.7, 0.8, 0.7, 0.6], border=0.5, below=True) == REFUTED
    assert verdict([0.1, 0.9, 0.8, 0.2, 0.4], border=0.5, below=True) == UNSEEN


def test_few_samples_decide_nothing() -> None:
    assert verdict([1.0] * 4) == UNSEEN


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")]])
def test_a_run_without_numbers_is_an_error(values: list[float]) -> None:
    with pytest.raises(ValueError, match="some"):
        Result.of(synthetic(), Found(values), 0.0, "")


def test_the_interval_is_that_of_a_bootstrap_over_samples() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    found = Result.of(synthetic(), Found(list(values)), 0.0, "")
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.02) and found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_every_method_has_a_claim_or_a_reason_for_none() -> None:
    covered = {method for claim in every() for method in claim.methods} | {*NO_CLAIM}
    registered = {f"{seam}={name}" for seam, names in registry.METHODS.items() for name in names}
    assert registered <= covered, f"no entry in scripts/claims/methods: {', '.join(sorted(registered - covered))}"


def test_names_mean_claims_methods_or_one_seam() -> None:
    assert {claim.name for claim in chosen(["copyspec"])} >= {"copyspec-turns"}
    both, weights = chosen(["int8"]), chosen(["quant=int8"])
    assert {*weights} < {*both} and all("quant=int8" in claim.methods for claim in weights)
    assert chosen(["copyspec-turns"]) == chosen(["copyspec-turns", "copyspec-turns"])
    assert chosen(["all"]) == every()
    with pytest.raises(ValueError, match="no claim of 'fcfs': the baseline"):
        chosen(["fcfs"])
    with pytest.raises(ValueError, match="no claim of 'nothing'"):
        chosen(["copyspec", "nothing"])


def test_the_page_quotes_the_results() -> None:
    quoted = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()
    assert quoted == claims.table(every(), claims.read()), "run: scripts/prove claims --write"


def test_results_are_of_claims_and_can_be_read_again(tmp_path: Path) -> None:
    results = claims.read()
    assert {*results} <= {claim.name for claim in every()}
    claims.write(results.values(), tmp_path / "results.json")
    assert claims.read(tmp_path / "results.json") == results


def test_a_row_has_the_verdict_that_follows_from_its_numbers() -> None:
    claim = synthetic()
    result = Result.of(claim, Found([0.5] * 6), 1.0, "")
    *_, row = claims.rows([claim], {"some": result})
    assert "**confirmed**" in row and "0.5 (0.5 to 0.5)" in row
    *_, row = claims.rows([dataclasses.replace(claim, below=True)], {"some": result})
    assert "**refuted**" in row
    *_, row = claims.rows([claim], {})
    assert "not run" in row
