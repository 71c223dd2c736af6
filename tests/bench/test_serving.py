"""The report of scripts/prove serving."""

from __future__ import annotations

import pytest

from redraft.errors import RedraftError
from scripts.proofs import serving
from scripts.proofs.serving import OFF, Measured

FOUND = {
    (8, OFF): [
        Measured({"output_throughput": 100.0, "median_ttft_ms": 10.0}, ["a", "b"]),
        Measured({"output_throughput": 50.0}, ["a", "b"]),
    ],
    (8, "other"): [
        Measured({"output_throughput": 150.0, "median_ttft_ms": 5.0}, ["a", "x"]),
        Measured({"output_throughput": 100.0}, ["a", "b"]),
    ],
    (8, "LLM.generate"): [Measured({"output_throughput": 200.0}, ["a", "b"])],
}


def test_ratios_are_within_a_round() -> None:
    assert serving.ratios(FOUND, 8, "other", "output_throughput") == [1.5, 2.0]
    assert serving.ratios(FOUND, 8, "other", "median_ttft_ms") == [0.5], "only rounds that have both"
    assert serving.ratios(FOUND, 1, "other", "output_throughput") == []
    assert serving.ratios(FOUND, 8, "other", "output_throughput", "LLM.generate") == [0.75]


def test_spread_says_the_middle_and_the_ends() -> None:
    assert [serving.spread(values) for values in ([], [1.5], [3.0, 1.0, 2.0])] == ["", "1.50", "2.00 (1.00 to 3.00)"]


def test_texts_are_compared_with_those_of_the_plain_loop() -> None:
    assert [serving.texts_equal(FOUND, name) for name in (OFF, "other", "LLM.generate")] == [(4, 4), (3, 4), (2, 2)]


def test_tables_hold_a_row_for_each_server() -> None:
    lines = list(serving.tables(FOUND))
    assert f"| 8 | {OFF} | 75.0 |" in lines[2] and "| 8 | LLM.generate | 200.0 |  |" in lines[4]
    assert "| 8 | other | 1.75 (1.50 to 2.00) | 0.50 |" in lines[-2] and not any(f"| 8 | {OFF}" in line for line in lines[5:])


def test_what_is_asked_and_what_warms_up_are_different_prompts() -> None:
    texts, others = serving.chosen(32)
    assert len(set(texts)) == 32 and others and not set(texts) & set(others)
    with pytest.raises(RedraftError, match="--requests 50: the suite has 50"):
        serving.chosen(50)
