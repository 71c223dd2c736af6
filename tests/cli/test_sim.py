"""`redraft sim`, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from redraft.core.step_cost import StepCost
from tests.cli.conftest import Ran

Redraft = Callable[..., Ran]
TRACE = "poisson:rate=5,prompt=300,output=20,spread=0.5,requests=60"


@pytest.fixture
def cost(tmp_path: Path) -> str:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(StepCost((1, 512), (0.01, 0.05), about={"model": "m", "backend": "b"}).document()))
    return str(path)


def test_one_configuration(redraft: Redraft, cost: str, tmp_path: Path) -> None:
    out_file = tmp_path / "out.json"
    code, out, err = redraft("sim", "--trace", TRACE, "--cost", cost, "--limits", "ttft=1,itl=0.2", "--json", str(out_file))
    assert code == 0, err
    assert "60 requests, drawn" in out and "P90 of ttft 1 s" in out and "time to first token (ttft)" in out
    assert max(map(len, out.splitlines())) <= 80
    ((run,),) = [one["runs"] for one in json.loads(out_file.read_text())["configurations"]]
    assert (run["requests"], run["refused"], run["workers"], run["held"]) == (60, 0, 1, True)
    assert 0 < run["latencies"]["itl@50"] <= run["latencies"]["itl@99"]


def test_all_combinations_are_compared(redraft: Redraft, cost: str, tmp_path: Path) -> None:
    given = ["--replicas", "1", "--replicas", "2", "--scheduler", "fcfs", "--scheduler", "sarathi:token_budget=128"]
    code, out, err = redraft("sim", "--trace", TRACE, "--cost", cost, *given)
    assert code == 0, err
    assert [line for line in out.splitlines() if line[:1].isdigit() and "replicas" in line] == [
        "1  1 replicas fcfs",
        "2  1 replicas sarathi:token_budget=128",
        "3  2 replicas fcfs",
        "4  2 replicas sarathi:token_budget=128",
    ]
    assert max(map(len, out.splitlines())) <= 80


def test_replicas_beside_splits(redraft: Redraft, cost: str) -> None:
    given = ["--replicas", "2", "--split", "1:1", "--router", "least-load", "--link", "token_bytes=1000,latency=0.01"]
    code, out, err = redraft("sim", "--trace", TRACE, "--cost", cost, *given)
    assert code == 0, err
    assert [line for line in out.splitlines() if line[:1].isdigit() and "requests" not in line][:2] == ["1  2 replicas", "2  1:1 split"]


def test_the_limits_that_do_not_hold_are_named(redraft: Redraft, cost: str) -> None:
    given = ["--replicas", "1", "--replicas", "40", "--limits", "ttft=0.001,e2el=9,joint=1", "--requests", "30"]
    code, out, err = redraft("sim", "--trace", TRACE, "--cost", cost, *given)
    assert code == 0, err
    assert out.startswith("30 of 60 requests, drawn")
    named = out.split("* the limits do not hold\n")[1].splitlines()
    assert [line.rsplit(" ", 2)[0] for line in named if "ttft" in line] == ["1  P90 of ttft 0.001 s:", "2  P90 of ttft 0.001 s:"]
    assert "2  requests within all limits: 0.0%, 100% wanted" in named and not any("2  P90 of e2el" in line for line in named)


def test_the_search_says_what_would_pay(redraft: Redraft, cost: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    given = ["--limits", "ttft=0.5,joint=0.9", "--search", "rate", "--plot", str(picture)]
    budgets = ["--scheduler", "sarathi:token_budget=64", "--scheduler", "sarathi:token_budget=1024"]
    code, out, err = redraft("sim", "--trace", TRACE, "--cost", cost, *budgets, *given)
    assert code == 0, err
    assert "requests a second and worker" in out and "times those of the first one" in out
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    code, out, err = redraft("sim", "--trace", TRACE, "--cost", cost, "--limits", "ttft=0.5", "--search", "replicas", "--rate", "80")
    assert code == 0 and "on 1 worker" not in out and "held" in out, err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--replicas", "0"], "replicas=0: must be 1 to 100000"),
        (["--scheduler", "nope"], "no sched method 'nope'"),
        (["--router", "splitwise"], "router = 'splitwise'"),
        (["--rate", "0"], "rate = 0: a number above 0 is allowed"),
        (["--requests", "0"], "requests = 0: 1 to 10000000 is allowed"),
        (["--skip", "1"], "skip = 1: 0 to 0.9 is allowed"),
        (["--limits", "tbt=1"], "limits = 'tbt=1'"),
        (["--link", "latency=1"], "link = 'latency=1': is between split workers"),
        (["--search", "rate"], "--limits are needed"),
        (["--split", "3"], "split = '3': PROMPT:DECODE"),
        (["--split", "0:2"], "split = '0:2': PROMPT:DECODE"),
        (["--split", "1:1", "--link", "bandwidth=0"], "bandwidth=0"),
        (["--search", "speed"], "search = 'speed': rate or replicas is allowed"),
        (["--cost", "missing.json"], "cost = missing.json"),
        (["--trace", "missing.csv"], "trace = missing.csv"),
        (["--search", "replicas", "--limits", "ttft=1", "--split", "1:1"], "search = replicas: a split has the workers that it names"),
    ],
)
def test_what_is_refused(redraft: Redraft, cost: str, given: list[str], message: str) -> None:
    code, out, err = redraft("sim", "--trace", TRACE, "--cost", cost, *given)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
