"""`redraft bench decode`: engines in their own processes, in turns. No test asserts durations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from redraft import registry
from redraft.bench import decode, shapes
from redraft.bench.decode import Comparison, DecodeOptions, Engine, Package, Spread
from redraft.bench.peers.peer import PLAIN, Job
from redraft.bench.peers.process import Lost, Worker
from redraft.engine import engine as engines
from redraft.errors import InvalidInput, RedraftError, UnknownMethod
from redraft.models import loader
from tests import adapters
from tests.bench.test_shapes import CONFIG
from tests.bench.workers import Fake

Ran = tuple[int, str, str]  # exit code, stdout, stderr
HERE = "tests.bench.workers"
SMALL = ["--context", "24", "--tokens", "6", "--prefill", "40", "--rows", "1,5", "--threads", "1"]
REPORTED = {"context": 24, "tokens": 6, "prefill": 40, "rows": (1, 5), "rounds": 2, "repeats": 1, "threads": 1, "buffer": 1 << 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shape") / "small"
    folder.mkdir()
    shapes.write(folder, {**CONFIG, "dtype": "float32"})
    return str(folder)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Fake", "Other", "Raises", "Dies", "Refuses", "Sleeps"):
        monkeypatch.setitem(decode.PEERS, name.lower(), Package(f"{HERE}:{name}", "json", "nothing"))


def job(model: str, **changes: Any) -> Job:
    given = {"dtype": "auto", "threads": 1, "vocab": 4096, "context": 24, "tokens": 6, "prefill": 40, "rows": (1, 5)}
    return Job(model, **{**given, **changes})


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- whole runs


def test_redraft_and_transformers_say_the_same(
    redraft: Callable[..., Ran], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_engines", small_limits(decode._engines))
    found = tmp_path / "found.json"
    small = [*SMALL, "--rounds", "2", "--redraft", "backend=torch"]
    code, out, err = redraft("bench", "decode", model, *small, "--isa", "avx2", "--json", str(found))
    assert code == 0, err
    assert "transformers: the same 7 greedy tokens as redraft backend=torch" in out and "tokens/s" in out and "of peak" in out
    document = json.loads(found.read_text())
    own, other = document["engines"]
    assert (own["name"], other["name"]) == ("redraft backend=torch", "transformers")
    assert own["facts"]["torch_threads"] == other["facts"]["torch_threads"] == 1
    assert own["facts"]["torch_isa"] == other["facts"]["torch_isa"] == "AVX2"
    for engine in (own, other):
        assert engine["lost"] is None and engine["text_differs"] is None
        assert [len(engine["rounds"][measure]) for measure in decode.MEASURES] == [2, 2, 2]
        assert all(len(one["seconds"]) == 6 for one in engine["rounds"]["decode"])
        assert set(engine["rounds"]["steps"][0]["seconds"]) == {"1", "5"}
        assert engine["summary"]["decode"]["share_of_limit"]["median"] > 0
        assert [len(engine["bytes_per_second"][measure]) for measure in ("decode", "steps")] == [2, 2]
        assert all(engine["summary"]["steps"][rows]["times_limit"]["median"] > 0 for rows in ("1", "5"))
    assert own["rounds"]["decode"][0]["tokens"] == own["rounds"]["decode"][1]["tokens"]
    assert len(set(own["rounds"]["decode"][0]["tokens"])) > 1  # a repeated token would hide differences
    assert own["summary"]["decode"]["speed_of_base"] == {"median": 1, "low": 1, "high": 1}


def test_steps_with_an_adapter(redraft: Callable[..., Ran], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_engines", small_limits(decode._engines))
    own = f"x={adapters.make(tmp_path / 'x', Path(model))}"
    found = tmp_path / "found.json"
    small = [model, *SMALL, "--rounds", "1", "--json", str(found)]
    code, out, err = redraft("bench", "decode", *small, "--lora", own)
    assert code == 0 and "transformers: its text is not compared" in " ".join(out.split()), err
    (with_it,) = [one for one in json.loads(found.read_text())["engines"] if one["name"] == f"redraft lora={own}"]
    code, out, err = redraft("bench", "decode", *small, "--against", "none", "--redraft", "", "--redraft", f"lora={own}")
    assert code == 0, err
    without, again = json.loads(found.read_text())["engines"]
    texts = [one["rounds"]["decode"][0]["tokens"] for one in (with_it, again, without)]
    assert texts[0] == texts[1] != texts[2]
    assert without["text_differs"] is again["text_differs"] is None
    assert f"redraft lora={own}: its text is not compared with that of redraft, because their adapters differ" in " ".join(out.split())


def test_every_measurement_has_the_adapter(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from redraft.bench.peers.redraft import Redraft

    threads = torch.get_num_threads()
    try:
        peer = Redraft(job(model, options={"lora": [f"x={adapters.make(tmp_path / 'x', Path(model))}"]}))
    finally:
        torch.set_num_threads(threads)
    forward, seen = peer.runner.forward, set[Any]()
    monkeypatch.setattr(peer.runner, "forward", lambda batch, *taps: seen.update(batch.adapters) or forward(batch, *taps))
    for ask in (peer.decode, peer.prefill, peer.steps, lambda: peer.generate(PLAIN, [5, 6], 3), lambda: peer.margin([5, 6], 7, 8)):
        seen.clear()
        ask()
        assert seen == {peer.runner.adapters["x"]}


def small_limits(make: Callable[[DecodeOptions], Any]) -> Callable[[DecodeOptions], Any]:
    def made(options: DecodeOptions) -> Any:
        engines, limits, missing = make(options)
        limits.options = {"bytes": 1 << 16, "side": 64}
        return engines, limits, missing

    return made


def impatient(measure: Callable[[Any, str], None]) -> Callable[[Any, str], None]:
    """A short time-out only for the worker that sleeps, because a busy machine may need long for the others."""

    def measured(engine: Any, what: str) -> None:
        if engine.worker and (engine.name, what) == ("sleeps", "decode"):
            engine.worker.timeout = 0.5
        measure(engine, what)

    return measured


def test_who_fails_is_named_and_the_others_go_on(model: str, peers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "OWN", f"{HERE}:Fake")
    monkeypatch.setattr(decode, "LIMITS", f"{HERE}:Bounds")
    monkeypatch.setattr(decode, "_measure", impatient(decode._measure))
    options = DecodeOptions(
        against=("raises", "dies", "refuses", "sleeps", "other"), timeout=300, redraft=({"backend": "torch"},), **REPORTED
    )
    found = decode.compare(model, options)
    lost = {engine.name: engine.lost for engine in found.engines}
    assert lost == {
        "redraft backend=torch": None,
        "raises": "prefill: ValueError: no prefill today",
        "dies": "decode: ended by SIGKILL: last words",
        "refuses": "not loaded: RedraftError: cannot load this",
        "sleeps": "decode: no answer within 0.5 seconds",
        "other": None,
    }
    raises, other = found.engines[1], found.engines[5]
    assert raises.found["decode"][0] and raises.found["prefill"] == raises.found["steps"] == [None, None]
    assert len(other.found["steps"]) == 2 and decode.speed_of_base(found, other, "prefill") == Spread(1, 1, 1)
    assert not any(lives(engine.facts["pid"]) for engine in found.engines[1:] if engine.facts)
    reported = list(decode.notes(found))
    assert "dies left: decode: ended by SIGKILL: last words" in reported
    document = json.loads(json.dumps(decode.document(found), allow_nan=False))
    assert document["engines"][2]["lost"] == lost["dies"]
    assert other.differs == {"token": 2, "expected": 3, "found": 9, "margin": 26.5, "near": 0.25}
    assert any("other: greedy text differs" in note and "token 3 of 7: NO near-tie" in note for note in reported)
    assert raises.differs is None and "raises: the same 7 greedy tokens as redraft backend=torch" in reported


def test_without_any_engine_there_is_an_error(model: str, peers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LIMITS", f"{HERE}:Bounds")
    monkeypatch.setattr(decode, "OWN", f"{HERE}:Refuses")
    with pytest.raises(RedraftError, match="no engine runs: redraft: not loaded: RedraftError: cannot load this"):
        decode.compare(model, DecodeOptions(against=(), **REPORTED))


def test_a_peer_that_is_not_installed_is_named_with_its_package(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LIMITS", f"{HERE}:Bounds")
    monkeypatch.setitem(decode.PEERS, "llama.cpp", Package("none:None", "no_such_module", "llama-cpp-python gguf"))
    monkeypatch.setattr(decode, "OWN", f"{HERE}:Fake")
    found = decode.compare(model, DecodeOptions(against=("llama.cpp",), **REPORTED))
    assert list(decode.notes(found)) == ["llama.cpp is not installed: pip install llama-cpp-python gguf"]
    assert found.base.facts["threads"] == "1" and found.base.facts["isa"] is None


def test_whom_isa_does_not_bind_is_marked(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LIMITS", f"{HERE}:Bounds")
    monkeypatch.setattr(decode, "OWN", f"{HERE}:Fake")
    assert decode.PEERS["llama.cpp"].beyond and decode.PEERS["openvino"].beyond and not decode.PEERS["transformers"].beyond
    for name, beyond in (("llama.cpp", "its heart"), ("transformers", "")):
        monkeypatch.setitem(decode.PEERS, name, Package(f"{HERE}:Fake", "json", "nothing", beyond))
    found = decode.compare(model, DecodeOptions(against=("llama.cpp", "transformers"), isa="avx2", **REPORTED))
    assert [engine.name for engine in found.engines] == ["redraft", "llama.cpp (beyond avx2)", "transformers"]
    assert "llama.cpp (beyond avx2): --isa does not limit its heart, which uses every" in "\n".join(decode.notes(found))
    assert [engine["beyond_isa"] for engine in decode.document(found)["engines"]] == [None, "its heart", None]
    assert [engine.facts["onednn"] for engine in found.engines] == ["AVX2"] * 3
    free = decode.compare(model, DecodeOptions(against=("llama.cpp",), **REPORTED))
    assert free.engines[1].name == "llama.cpp" and not any("--isa" in note for note in decode.notes(free))


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("moment", ["loading", "round 3/"])
def test_ctrl_c_ends_every_process_and_keeps_what_was_measured(model: str, moment: str, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    code = f"""
import sys
from redraft.bench import decode, report
from redraft.cli.main import run
decode.OWN, decode.LIMITS, report.EVERY = "{HERE}:Fake", "{HERE}:Bounds", 0
decode.PEERS["transformers"] = decode.Package("{HERE}:Other", "json", "nothing")
small = ["--rounds", "1000000", "--threads", "1", "--prefill", "40", "--rows", "1", "--redraft", "backend=torch"]
sys.exit(run(["bench", "decode", {model!r}, *small, "--json", {str(found)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert any(moment in line for line in process.stderr)
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 130 and not any(lives(pid) for pid in children), err[-2000:]
        last = err.splitlines()[-1]
        if moment == "loading":
            assert (out, last) == ("", "stopped") and not found.exists()
        else:
            assert len(children) == 3 and last == "stopped: the tables hold the rounds before"
            assert "tokens/s" in out and "greedy text differs from redraft backend=torch's at token 3 of 7" in out
            document = json.loads(found.read_text())
            assert document["stopped"] and 2 <= len(document["engines"][0]["rounds"]["decode"]) < 1000
    finally:
        process.kill()
        process.communicate()


# ---- one process


def state(thread: Path) -> str:
    return (thread / "stat").read_text().rpartition(")")[2].split()[0]


def test_an_idle_worker_stands_still_with_all_its_threads(model: str) -> None:
    worker = Worker(f"{HERE}:Spins", job(model), {"OMP_NUM_THREADS": "1"}, 30)
    try:
        worker.ask({"do": "decode"})
        threads, deadline = Path(f"/proc/{worker.process.pid}/task"), time.monotonic() + 300
        while {state(thread) for thread in threads.iterdir()} != {"T"}:  # stopped; it sleeps and runs otherwise
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(list(threads.iterdir())) > 1
    finally:
        worker.end()
    assert not lives(worker.process.pid)


def test_a_worker_dies_with_its_parent() -> None:
    code = f"""
import os, sys
from redraft.bench.peers.peer import Job
from redraft.bench.peers.process import Worker
worker = Worker("{HERE}:Fake", Job("", "auto", 1, 9, 1, 4, 1, (1,)), {{"OMP_NUM_THREADS": "1"}}, 30)
print(worker.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid, deadline = int(done.stdout), time.monotonic() + 300
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not lives(pid)


def test_an_unknown_measurement_is_an_error_and_not_the_end(model: str) -> None:
    worker = Worker(f"{HERE}:Fake", job(model), {"OMP_NUM_THREADS": "1"}, 30)
    try:
        with pytest.raises(Lost, match="AttributeError"):
            worker.ask({"do": "nothing"})
        assert worker.ask({"do": "prefill"}) == {"seconds": 2.0}
    finally:
        worker.end()


def test_each_mode_of_redraft_runs_its_own_drafter(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from redraft.bench.peers.redraft import Redraft

    threads = torch.get_num_threads()
    try:
        peer = Redraft(job(model))
    finally:
        torch.set_num_threads(threads)
    asked: list[str] = []
    step = engines.Engine.step
    monkeypatch.setattr(engines.Engine, "step", lambda engine, only=None: asked.append(engine.drafter.own.name) or step(engine, only))
    texts = []
    for mode in (PLAIN, "copyspec", PLAIN):
        asked.clear()
        texts.append(peer.generate(mode, job(model).prompt(6) * 3, 8)["tokens"])
        assert set(asked) == {"none" if mode == PLAIN else mode}
    assert texts == [texts[0]] * 3


def test_the_margin_is_of_the_logits_behind_the_prompt(model: str) -> None:
    from redraft.bench.peers.redraft import Redraft

    threads = torch.get_num_threads()
    try:
        peer = Redraft(job(model))
    finally:
        torch.set_num_threads(threads)
    prompt = job(model).prompt(24)
    tokens = peer.decode()["tokens"]
    for i, token in enumerate(tokens[:3]):
        assert peer.margin(prompt + tokens[:i], token, (token + 1) % 4096)["margin"] > 0
    assert peer.margin(prompt, 7, 7)["margin"] == 0
    assert not peer.runner.memory.paged.table._held


# ---- figures


def test_ratios_are_taken_within_a_round() -> None:
    def engine(name: str, *took: float | None) -> Engine:
        found: dict[str, list[Any]] = {"prefill": [one and {"seconds": one} for one in took]}
        return Engine(name, "", {}, {"dtype": "bfloat16"}, found)

    spec = shapes.spec_of("100m")
    limits = Engine("limits", "", {}, {}, {"peak": [{"flops_per_second": {"bfloat16": peak}} for peak in (1e12, 2e12, 4e12)]})
    base, peer = engine("base", 1.0, 2.0, 4.0), engine("peer", 2.0, None, 2.0)
    found = Comparison("m", Path(), spec, DecodeOptions(), [base, peer], limits, {})
    assert decode.speed_of_base(found, peer, "prefill") == Spread(1.25, 0.5, 2.0)
    work = decode.linear_flops(spec, 512)
    assert decode.share(found, base, "prefill") == pytest.approx(
        (work / 4e12, work / 1.6e13, work / 1e12)[:0] or (work / 4e12, work / 16e12, work / 1e12)
    )


def test_a_step_is_compared_with_the_limit_of_its_round() -> None:
    """Bandwidth before and after the turn, and the peak of the round; more rows are limited by arithmetic."""
    spec = shapes.spec_of("100m")
    took = [{"seconds": {"1": 0.02, "32": 0.5}}, {"seconds": {"1": 0.03, "32": 0.75}}, None]
    reads: dict[str, list[float | None]] = {"steps": [1e10, 2e10, 2e10]}
    one = Engine("one", "", {"quant": "int8"}, {"dtype": "bfloat16"}, {"steps": took}, reads=reads)
    peaks = [{"flops_per_second": {"float32": 1e11, "int8": peak}} for peak in (2e11, 4e11, 4e11)]
    options = DecodeOptions(rows=(1, 32), context=100)
    found = Comparison("m", Path(), spec, options, [one], Engine("limits", "", {}, {}, {"peak": peaks}), {})
    size = decode.read_bytes(spec, "bfloat16", "int8") + decode.cache_bytes(spec, 100, 2)
    flops = 2 * 32 * (12 * (768 * (768 + 2 * 256) + 768 * 768 + 3 * 768 * 2048) + 32000 * 768)
    assert decode.least(found, one, 1)[:2] == pytest.approx([size / 1e10, size / 2e10])
    assert decode.least(found, one, 32)[:2] == pytest.approx([flops / 2e11, flops / 4e11])
    times = decode.document(found)["engines"][0]["summary"]["steps"]
    assert times[1]["times_limit"]["high"] == pytest.approx(0.03 / (size / 2e10))
    plain = Engine("plain", "", {}, {"dtype": "bfloat16"}, {}, reads=reads)
    assert decode.least(found, plain, 32)[0] == pytest.approx(flops / 1e11), "without its instruction: in float32"
    lines = printed(
        decode.beside_limits({r: decode.seconds(one, "steps", r) for r in (1, 32)}, {r: decode.least(found, one, r) for r in (1, 32)})
    )
    assert lines[0].split() == ["rows", "1", "32"] and lines[1].split()[0] == "ms" and lines[1].split()[-1] == "625"
    assert lines[-1].split() == ["times", "1", "row", "1.00", "25.00"]


def printed(table: Any) -> list[str]:
    out = StringIO()
    Console(file=out, width=80).print(table)
    return out.getvalue().splitlines()


def test_ten_numbers_of_rows_fit_80_columns() -> None:
    rows = DecodeOptions().rows
    took = {r: [0.01234 * r] * 5 for r in rows}
    lines = printed(
        decode.beside_limits(took, {r: [0.0123] * 5 for r in rows}, {"speed of base": dict.fromkeys(rows, Spread(0.5, 0.4, 0.6))})
    )
    assert len(lines) == 8 and all(len(line.split()) >= 11 and "…" not in line for line in lines[1:])


def test_short_calls_are_in_microseconds_and_fit_with_eleven_numbers_of_rows() -> None:
    rows = (*DecodeOptions().rows, 512)
    lines = printed(decode.beside_limits({r: [1.234e-5 * (1 + r / 50)] for r in rows}, {r: [7.474e-8] for r in rows}))
    assert lines[1].split()[:2] == ["us", "12.6"] and lines[2].split()[:3] == ["limit,", "us", "0.075"]
    assert all(len(line) <= 80 and "…" not in line for line in lines)


def test_what_a_token_must_read_and_a_prompt_computes() -> None:
    spec = shapes.spec_of("llama-3.2-1b")
    layer = 2048 * (2048 + 2 * 512) + 2048 * 2048 + 3 * 2048 * 8192
    head = 128256 * 2048
    assert decode.read_bytes(spec, "bfloat16") == 2 * (16 * layer + head)
    assert decode.linear_flops(spec, 512) == 2 * (512 * 16 * layer + head)
    assert decode.cache_bytes(spec, 1024, 2) == 2 * 16 * 8 * 64 * 1024 * 2
    codes = decode.read_bytes(spec, "bfloat16", "int8")
    assert 16 * layer + head < codes < 1.01 * (16 * layer + head)


def test_decode_is_the_median_of_the_steady_part() -> None:
    engine = Engine("e", "", {}, {}, {"decode": [Fake(empty_job()).decode(), None]})
    assert decode.seconds(engine, "decode") == [0.5, None]


def empty_job() -> Job:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return Job("", "auto", 1, 9, 1, 4, 1, (1,))


def test_all_engines_get_the_same_prompt() -> None:
    one, two = job("a"), job("b", options={"backend": "torch"})
    assert one.prompt(30) == two.prompt(30) and one.prompt(9) == one.prompt(30)[:9] and job("a", seed=1).prompt(9) != one.prompt(9)
    assert one.longest == 41 and job("a", context=90, rows=(1, 64)).longest == 155


def test_own_engines() -> None:
    assert decode.own_engines({"quant": "int8"}, []) == ({"quant": "int8"},)
    both = decode.own_engines({"quant": "int8"}, ["backend=torch", "backend=native,quant=int4"])
    assert both == ({"quant": "int8", "backend": "torch"}, {"quant": "int4", "backend": "native"})


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        ({"against": ("transformer",)}, "no engine 'transformer' to run against: did you mean 'transformers'"),
        ({"redraft": ({"backend": "torhc"},)}, "no backend 'torhc': did you mean 'torch'"),
        ({"redraft": ({"bakend": "torch"},)}, "unknown option 'bakend': did you mean 'backend'"),
        ({"redraft": ({"quant": "int9"},)}, "no quant method 'int9': did you mean 'int"),
        ({"redraft": ({"lora": ["x=a", "y=b"]},)}, "one adapter is measured at a time, 2 are given"),
        ({"redraft": ({"lora": "x"},)}, "'x' is not NAME=FOLDER"),
        ({"isa": "avx"}, "isa = 'avx': did you mean 'avx"),
        ({"rows": (4, 1)}, "rows = 4,1: ascending numbers"),
        ({"rounds": 0}, "rounds = 0: must be 1 or more"),
        ({"timeout": float("nan")}, "timeout = nan: seconds, more than 0"),
    ],
)
def test_what_is_asked_wrongly_is_reported_before_anything_runs(options: dict[str, Any], reported: str) -> None:
    with pytest.raises((InvalidInput, UnknownMethod)) as error:
        DecodeOptions(**options)
    assert reported in str(error.value)


def test_a_run_that_outgrows_the_context_is_refused(model: str) -> None:
    with pytest.raises(InvalidInput, match="601 positions are needed, but the model's context is 512"):
        decode.compare(model, DecodeOptions(prefill=600))


def test_errors_of_the_command_line_are_one_line(redraft: Callable[..., Ran]) -> None:
    for arguments, reported in (
        (["llama-3.2-1"], "did you mean 'llama-3.2-1b'"),
        (["100m", "--against", "lama.cpp"], "did you mean 'llama.cpp'?"),
        (["100m", "--rows", "1,x"], "rows = '1,x': whole numbers with commas are needed"),
        (["100m", "--redraft", "torch"], "'torch' is not option=value"),
    ):
        code, out, err = redraft("bench", "decode", *arguments)
        assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and reported in err, err


def test_registered_names_lead_somewhere() -> None:
    for target in (decode.OWN, decode.LIMITS, decode.PEERS["transformers"].target, decode.PEERS["openvino"].target):
        assert registry.load(target).__doc__ is not None or registry.load(target)
    assert loader.DTYPES  # the names that facts use
