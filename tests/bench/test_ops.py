"""`redraft bench ops`: every operation of every backend has its line. No test asserts durations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from redraft import registry
from redraft.bench import ops, report, shapes
from redraft.bench.ops import OpsOptions
from redraft.errors import InvalidInput, UnknownMethod, Unsupported
from redraft.ops.torch_ops import TorchOps
from tests.bench.test_shapes import CONFIG

Ran = tuple[int, str, str]  # exit code, stdout, stderr


TINY: dict[str, Any] = {"dtype": "float32", "rows": (1, 3), "cached": (40,), "shared": 64, "rounds": 2, "cold": 1 << 14}


class Noted(TorchOps):
    """Records its number of threads, its shapes and the memory that it read."""

    name = "noted"
    log: list[tuple[Any, ...]] = []  # noqa: RUF012

    def linear(self, x: Any, weights: Any) -> Any:
        self.log.append((torch.get_num_threads(), tuple(x.shape), id(weights)))
        return super().linear(x, weights)

    def attend(self, index: int, layer: Any, q: Any, k: Any, v: Any, pool: Any, plan: Any) -> Any:
        out = super().attend(index, layer, q, k, v, pool, plan)
        slots = sum(group.slots for group in plan.groups)
        self.log.append((torch.get_num_threads(), index, tuple(q.shape), slots))
        assert torch.isfinite(out).all()
        return out


class Absent(TorchOps):
    def __init__(self, *given: Any) -> None:
        raise Unsupported("backend 'absent': no compiler")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ops, "SAMPLE", 0.0)
    floor = {"bytes_per_second": 1e10, "flops_per_second": {"float32": 1e11}}
    monkeypatch.setattr(ops.limits, "limits", lambda *given: floor)
    monkeypatch.setattr(ops.limits, "peaks", lambda: {"float32": 1e11})
    buffer = ops.limits.buffer
    monkeypatch.setattr(ops.limits, "buffer", lambda size: buffer(1 << 14))
    monkeypatch.setattr(ops.limits, "bandwidth", lambda *given: floor["bytes_per_second"])
    monkeypatch.setattr(ops, "ATTENDED", (1, 16))
    monkeypatch.setattr(ops, "TEXTS", 3)
    monkeypatch.setitem(registry.BACKENDS, "noted", "tests.bench.test_ops:Noted")
    monkeypatch.setitem(registry.BACKENDS, "native-like", "tests.bench.test_ops:Noted")
    monkeypatch.setitem(registry.BACKENDS, "absent", "tests.bench.test_ops:Absent")
    Noted.log.clear()
    threads = torch.get_num_threads()
    yield
    ops.limits.use_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("shape") / "config.json"
    file.write_text(json.dumps(CONFIG))
    return str(file)


def test_every_operation_has_a_line_for_each_backend_and_size(model: str) -> None:
    reported: list[str] = []
    found = ops.measure(model, OpsOptions(backends=("torch", "noted", "absent"), quants=("int8",), **TINY), reported.append)
    names = [name.split(",")[0] for name in reported]
    assert names[:18:3] == ["qkv", "out", "up", "down", "head", "a call"] and len(reported) == 24 == ops.ticks(found.options)
    assert [name.rpartition(": ")[2] for name in reported[:3]] == ["making weights", "round 1 of 2", "round 2 of 2"]
    assert found.refused == {"absent": "backend 'absent': no compiler"}
    lines = {(line.operation, line.backend, line.size) for line in found.lines}
    assert len(lines) == len(found.lines) == 6 * 2 * 2 * 2 + (3 + 2) * 2
    assert all(len(line.seconds) == 2 for line in found.lines)
    assert all(min(line.seconds) > 0 for line in found.lines if not line.operation.startswith("attention"))
    spec = shapes.spec_of(model)
    qkv = next(line for line in found.lines if line.operation.startswith("qkv") and line.size == "3 rows" and line.backend == "noted")
    assert qkv.bytes == 4 * 32 * 16 and qkv.flops == 2 * 3 * 32 * 16 and qkv.kind == "float32"
    int8 = next(line for line in found.lines if line.operation.startswith("head") and line.backend == "torch int8")
    assert spec.vocab * 16 < int8.bytes < spec.vocab * 16 * 1.5 and int8.kind == "int8"


def test_the_limit_is_the_longer_of_reading_and_computing(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter(range(1, 1_000_000))
    peaks = iter(range(1, 1_000_000))
    monkeypatch.setattr(ops.limits, "bandwidth", lambda held, repeats: 1e6 * next(reads))
    monkeypatch.setattr(ops.limits, "peaks", lambda: {"float32": 1e6 * next(peaks), "int8": 4e6})
    found = ops.measure(model, OpsOptions(backends=("torch",), quants=("int8",), **{**TINY, "rows": (1, 64), "shared": 0}))
    first = [line for line in found.lines if line.operation.startswith("qkv")]
    assert [(line.backend, line.rows, line.count) for line in first] == [
        ("torch", 1, 2), ("torch int8", 1, 2), ("torch", 64, 2), ("torch int8", 64, 2)
    ]  # fmt: skip
    # the first round, which is not counted, read four times; the second begins with the second line, the third with the third
    one, int8, many, _ = first
    assert one.limits == [max(one.bytes / 8e6, one.flops / 2e6), max(one.bytes / 11e6, one.flops / 3e6)]
    assert many.limits == [many.flops / 2e6, many.flops / 3e6], "computed in float32"
    assert int8.limits == [max(int8.bytes / 5e6, int8.flops / 4e6), max(int8.bytes / 12e6, int8.flops / 4e6)]
    ratios = sorted(took / least for took, least in zip(one.seconds, one.limits))
    assert one.times_limit == (pytest.approx(sum(ratios) / 2), *ratios)


def test_all_linear_layers_of_a_step_are_added_up(model: str) -> None:
    found = ops.measure(model, OpsOptions(backends=("torch",), **TINY))
    total = found.linear("torch")
    assert list(total) == [1, 3]
    for rows, line in total.items():
        parts = [one for one in found.lines if one.rows == rows]
        assert len(parts) == 6 and sorted(one.count for one in parts) == [0, 1, 2, 2, 2, 2]
        call = next(one for one in parts if one.operation == ops.CALL)
        shares = sorted(9 * one / whole for one, whole in zip(call.seconds, line.seconds))
        assert found.calls("torch")[rows] == (pytest.approx(sum(shares) / 2), pytest.approx(shares[0]), pytest.approx(shares[1]))
        for turn in range(2):
            assert line.seconds[turn] == pytest.approx(sum(one.count * one.seconds[turn] for one in parts))
            assert line.limits[turn] == pytest.approx(sum(one.count * one.limits[turn] for one in parts))
        assert line.bytes == sum(one.count * one.bytes for one in parts)
    own = next(line for line in found.lines if line.rows == 3 and line.operation.startswith("up"))
    assert found.linear("torch", own.operation)[3].seconds == own.seconds, "one layer alone"


def test_attention_reads_what_it_says_in_all_layers(model: str) -> None:
    ops.measure(model, OpsOptions(backends=("noted",), **TINY))
    seen = [entry for entry in Noted.log if len(entry) == 4]
    assert {index for _, index, _, _ in seen} == {0, 1}
    # 40 cached and 1 or 16 rows are two pages, for each of 3 texts; 64 shared and a row three; and 1 token, whose time is subtracted
    slots = {(shape[0], slots) for _, _, shape, slots in seen}
    assert slots >= {(1, 64), (16, 64), (3, 64), (1, 96), (8, 96), (1, 32), (16, 32), (3, 32), (8, 32)}


def test_attention_stands_beside_the_limit_of_its_round(model: str) -> None:
    found = ops.measure(model, OpsOptions(backends=("noted",), **TINY))
    lines = {(line.operation, line.size): line for line in found.lines if line.operation.startswith("attention")}
    one, texts = (lines["attention over 40 cached tokens", size] for size in ("1 sequence, 16 rows", "3 sequences, 1 row"))
    spec = shapes.spec_of(model)
    each = 2 * 4 * spec.kv_heads * spec.head_dim
    assert one.bytes == 56 * each and texts.bytes == 3 * 41 * each
    assert one.flops == 4 * 16 * (40 + 8.5) * spec.attention[0].heads * spec.head_dim
    assert one.limits == [max(one.bytes / 1e10, one.flops / 1e11)] * 2
    assert one.times_limit is not None and one.times_limit.median == pytest.approx(sum(s / one.limits[0] for s in one.seconds) / 2)


def test_weights_are_read_from_several_copies_and_others_threads_rest(model: str) -> None:
    ops.measure(model, OpsOptions(backends=("noted", "native-like"), threads=2, **TINY))
    linear = [entry for entry in Noted.log if len(entry) == 3]
    assert {threads for threads, _, _ in linear} == {1, 2}
    copies = {place for _, shape, place in linear if shape == (1, 16)}
    assert len(copies) > 8


def test_document_and_table(redraft: Callable[..., Ran], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "COPIES", 2)
    file = tmp_path / "found.json"
    small = ["--rows", "1,3", "--cached", "40", "--shared", "0", "--rounds", "1", "--threads", "1", "--dtype", "float32"]
    code, out, err = redraft("bench", "ops", model, "--backend", "torch", *small, "--json", str(file))
    assert code == 0 and "attention over 40 cached tokens" in out and "times the limit" in out, err
    assert "all linear layers of a step" in out and out.count("times limit") == 3 * 7 and "times 1 row" in out
    document = json.loads(file.read_text())
    assert set(document["linear_layers"]) == {"torch", "torch int8", "torch int4"}
    assert all(one["times_limit"]["median"] > 0 for one in document["linear_layers"]["torch"].values())
    assert len(document["lines"]) == 3 * 6 * 2 + 3 and all(math.isfinite(line["of_bandwidth"]) for line in document["lines"])


def test_progress_is_reported_where_no_terminal_reads_it_and_so_is_ctrl_c(
    redraft: Callable[..., Ran], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "COPIES", 2)
    small = ["--rows", "1", "--cached", "40", "--shared", "0", "--rounds", "1", "--threads", "1", "--backend", "torch", "--quant", "none"]
    monkeypatch.setattr(report, "EVERY", math.inf)
    assert redraft("bench", "ops", model, *small)[2] == ""
    monkeypatch.setattr(report, "EVERY", 0)
    code, out, err = redraft("bench", "ops", model, *small)
    assert code == 0 and "GB/s" in out
    assert [line.partition(" ")[0] for line in err.splitlines()] == [f"{i}/14" for i in range(1, 15)]
    assert err.startswith("1/14 qkv, 16 to 32: making weights\n2/14 qkv, 16 to 32: round 1 of 1\n3/14 out")

    def stop(run: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "_sample", stop)
    assert redraft("bench", "ops", model, *small) == (130, "", "1/14 qkv, 16 to 32: making weights\nstopped\n")


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        ({"backends": ("torhc",)}, "no backend 'torhc': did you mean 'torch'"),
        ({"quants": ("int9",)}, "no quant method 'int9': did you mean 'int"),
        ({"dtype": "float16"}, "dtype = 'float16': allowed are"),
        ({"rows": (0,)}, "rows = 0: numbers from 1 to"),
        ({"cached": (1 << 40,)}, "cached = 1099511627776: numbers from 1 to"),
        ({"shared": -1}, "shared = -1: numbers from 0 to"),
        ({"rounds": 0}, "rounds = 0: must be 1 or more"),
    ],
)
def test_what_is_asked_wrongly_is_reported(options: dict[str, Any], reported: str) -> None:
    with pytest.raises((InvalidInput, UnknownMethod)) as error:
        OpsOptions(**options)
    assert reported in str(error.value)
