"""Traces: what is read is what the file says, and drawn requests have the means that they were asked for."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from redraft.errors import InvalidInput
from redraft.sim.trace import Arrival, Trace, read, requests

MOONCAKE = [
    {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [7, 9]},
    {"timestamp": 1000, "input_length": 1024, "output_length": 2, "hash_ids": [7, 8]},
]


def test_prompts_begin_alike_as_far_as_their_hashes_are_equal(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, MOONCAKE)).encode()))
    trace = read(str(path))
    assert [one.at for one in trace.arrivals] == [0.0, 2.0]
    (_, one), (_, other) = requests(trace.arrivals)
    assert (len(one.prompt), len(other.prompt), len(one.output), len(other.output)) == (1024, 600, 2, 5)
    assert [a == b for a, b in zip(one.prompt, other.prompt, strict=False)] == [True] * 512 + [False] * 88
    assert not {*one.output, *other.output} & {*one.prompt, *other.prompt} and set(one.output) != set(other.output)


def test_a_table_of_arrivals(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:05.5,40,3\n2023-11-16 18:17:04.0,30,2\n")
    assert list(read(str(path)).arrivals) == [Arrival(0.0, 30, 2), Arrival(1.5, 40, 3)]


def test_prompts_without_hashes_share_nothing() -> None:
    (_, one), (_, other) = requests([Arrival(0.0, 9, 1), Arrival(0.0, 9, 1)])
    assert not set(one.prompt) & set(other.prompt)


def test_a_short_trace_begins_again_with_other_prompts() -> None:
    trace = Trace([Arrival(0.0, 600, 1, [0, 1]), Arrival(2.0, 300, 2, [0])], "two").cut(5)
    assert [one.at for one in trace.arrivals] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert [list(one.blocks) for one in trace.arrivals] == [[0, 1], [0], [2, 3], [2], [4, 5]]


def test_a_trace_at_another_rate_has_the_same_requests() -> None:
    trace = read("poisson:rate=2,requests=50,spread=1").at_rate(8.0)
    again = read("poisson:rate=2,requests=50,spread=1")
    assert (trace.rate, again.rate) == (pytest.approx(8.0), pytest.approx(2.0))
    assert [one[1:] for one in trace.arrivals] == [one[1:] for one in again.arrivals]
    assert trace.poisson(0).rate == pytest.approx(8.0)
    assert [one.at for one in trace.poisson(0).arrivals] != [one.at for one in trace.poisson(1).arrivals]


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_drawn_requests_have_the_means_that_were_asked_for(cv: float) -> None:
    found = read(f"poisson:rate=5,prompt=100,output=20,spread=0.5,cv={cv},requests=20000").arrivals
    gaps = np.diff([one.at for one in found])
    assert gaps.mean() == pytest.approx(0.2) and gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    assert np.mean([one.prompt for one in found]) == pytest.approx(100, rel=0.02)
    assert np.mean([one.output for one in found]) == pytest.approx(20, rel=0.02)
    logs = np.log([one.prompt for one in found])
    assert logs.std() == pytest.approx(0.5, rel=0.05)


def test_groups_share_the_start_of_their_prompts() -> None:
    found = [request.prompt for _, request in requests(read("poisson:prompt=50,shared=40,groups=3,requests=30").arrivals)]
    assert len({tuple(prompt[:40]) for prompt in found}) == 3 and len({tuple(prompt) for prompt in found}) == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poisson:rate=0", "rate=0.0: must be above 0"),
        ("poisson:rat=1", "unknown option 'rat'"),
        ("poisson:prompt=5,shared=6", "shared=6: at most prompt = 5"),
        ("trace.txt", "a .csv or .jsonl file"),
        ("missing.csv", "cannot be read"),
        ("missing.jsonl", "cannot be read"),
    ],
)
def test_traces_that_do_not_exist(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is not JSON"),
        ("[1]", "line 1: an object is needed"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1}', "input_length = 0: a number of 1 or more"),
        ('{"timestamp": 0, "input_length": 5}', "output_length = None"),
        ('{"timestamp": true, "input_length": 5, "output_length": 1}', "timestamp = True"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": ["a"]}', "hash_ids = "),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}', "2 entries for 5 tokens"),
        ("", "has no rows"),
    ],
)
def test_lines_that_are_no_requests(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(InvalidInput, match=message):
        read(str(path))
