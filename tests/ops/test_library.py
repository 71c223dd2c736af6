"""The shared library: it loads or reports a reason, has typed functions, obeys REDRAFT_ISA, and loads only on request."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from redraft.errors import InvalidInput
from redraft.ops import library
from redraft.ops.library import Library

ISAS = ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
FLAGS = {  # what Linux calls the bits that each set adds
    "avx2": "avx2 fma f16c bmi2",
    "avx512": "avx512f avx512bw avx512dq avx512vl",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx": "amx_tile amx_bf16 amx_int8",
}

loaded = library.load() if library.PATH.exists() else None


@pytest.mark.skipif(shutil.which("c++") is None or platform.machine() != "x86_64", reason="no compiler, or no kernels for this processor")
def test_where_there_is_a_compiler_there_is_the_library() -> None:
    """Otherwise every test of the native backend would be skipped without notice."""
    assert library.PATH.exists(), "make install compiles it"


native = pytest.mark.skipif(loaded is None, reason=f"no native library: {library.why_not()}")


def lib() -> Library:
    assert loaded is not None
    return loaded


def ran(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh process, because the library reads its environment once."""
    environment = {**os.environ, "REDRAFT_ISA": "", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_importing_redraft_loads_no_library() -> None:
    code = "import redraft.ops.library, redraft.cli.main; print('_kernels' in open('/proc/self/maps').read())"
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not tell what is loaded")
    assert ran(code).stdout == "False\n"
    if loaded is not None:  # the same question has the other answer once it is loaded
        assert ran(code.replace("; print", "; redraft.ops.library.load(); print")).stdout == "True\n"


def test_no_library_gives_the_reason(tmp_path: Path) -> None:
    found, reason = library.open_library(tmp_path / "_kernels.so")
    assert found is None
    assert str(tmp_path) in reason and "compiled when Redraft is installed" in reason


def test_a_damaged_library_gives_the_reason(tmp_path: Path) -> None:
    (tmp_path / "_kernels.so").write_bytes(b"no library")
    found, reason = library.open_library(tmp_path / "_kernels.so")
    assert found is None
    assert "does not load" in reason


@native
def test_an_older_library_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.SIGNATURES, "rd_of_tomorrow", (ctypes.c_int,))
    found, reason = library.open_library(library.PATH)
    assert found is None
    assert "older than this code" in reason and "rd_of_tomorrow" in reason


@native
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read structures at the wrong places."""
    monkeypatch.setattr(library, "SIZES_OF", "24 120")
    found, reason = library.open_library(library.PATH)
    assert found is None and "was compiled from other sources" in reason


def test_without_a_library_another_backend_serves_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_load", lambda: (None, "it is not there"))
    assert library.load() is None
    assert library.serves("float32", "cpu") == ("torch" if find_spec("torch") else "numpy", "it is not there")


@native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_serves_what_it_knows(dtype: str) -> None:
    assert library.serves(dtype, "cpu") == ("native", f"compiled kernels for {lib().isa}")
    if find_spec("torch"):
        import torch

        assert library.serves(getattr(torch, dtype), torch.device("cpu"))[0] == "native"


@pytest.mark.parametrize(
    ("dtype", "device", "reported"), [("float64", "cpu", "float64"), ("float16", "cpu", "float16"), ("float32", "cuda:0", "cuda:0")]
)
def test_another_backend_serves_the_rest(dtype: str, device: str, reported: str) -> None:
    backend, why = library.serves(dtype, device)
    assert backend == ("numpy" if dtype == "float64" and not find_spec("torch") else "torch")
    assert reported in why


@native
def test_detection_agrees_with_the_kernel() -> None:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip("no /proc/cpuinfo")
    flags = next(set(line.partition(":")[2].split()) for line in info.read_text().splitlines() if line.startswith("flags"))
    best = "none"
    for isa in ISAS:
        if not set(FLAGS[isa].split()) <= flags:
            break
        best = isa
    assert lib().isa_detected == best
    assert lib().isas_compiled == ISAS[: len(lib().isas_compiled)]


SHOW = "from redraft.ops import library; l = library.load(); print(l.isa, l.isa_detected, l.peak_instruction('float32'))"


@native
@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_lowers_the_instruction_set_or_is_refused(isa: str) -> None:
    run = ran(SHOW, REDRAFT_ISA=isa)
    detected = lib().isa_detected
    if ISAS.index(isa) <= ISAS.index(detected) and isa in lib().isas_compiled:
        assert run.returncode == 0, run.stderr
        width = "256" if isa == "avx2" else "512"
        assert run.stdout == f"{isa} {detected} vfmadd231ps, {width} bits\n"
    else:
        assert run.returncode == 1  # an exception, no signal
        message = run.stderr.splitlines()[-1]
        assert message.startswith("redraft.errors.InvalidInput") and isa in message and detected in message


@native
def test_an_unknown_instruction_set_is_refused() -> None:
    run = ran(SHOW, REDRAFT_ISA="sse9")
    assert run.returncode == 1
    assert "REDRAFT_ISA = sse9: allowed: avx2, avx512, avx512_vnni, avx512_bf16, amx" in run.stderr


@native
def test_loops_of_every_lower_set_run() -> None:
    below = [isa for isa in lib().isas_compiled if ISAS.index(isa) <= ISAS.index(lib().isa_detected)]
    for isa in below:
        run = ran("from redraft.ops import library; l = library.load(); print([l.peak(k) > 0 for k in library.PEAKS])", REDRAFT_ISA=isa)
        pairs, codes = isa in ("avx512_bf16", "amx"), isa in ("avx512_vnni", "avx512_bf16", "amx")
        assert run.stdout == f"[True, {pairs}, {codes}]\n", run.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [("", None), ("1", 1), ("1,4", 1), (" 1 ", 1), ("100000", None), ("0", None), ("-1", None), ("many", None)],
)
def test_threads_are_those_of_the_process_capped_by_openmp(monkeypatch: pytest.MonkeyPatch, given: str, expected: int | None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert library.default_threads() == (expected or cores)


@native
def test_the_number_of_threads_is_kept() -> None:
    before = lib().threads
    assert before == library.default_threads()
    try:
        for count in (3, 1, 2):
            lib().set_threads(count)
            assert lib().threads == count
        with pytest.raises(InvalidInput, match="threads = 0"):
            lib().set_threads(0)
        assert lib().threads == 2
    finally:
        lib().set_threads(before)


@native
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [64, 128, 64 * 7, 4096, 1 << 20])
def test_fill_writes_every_byte_and_none_beyond(threads: int, size: int) -> None:
    before = lib().threads
    edge = 64
    buffer = (ctypes.c_uint8 * (size + 2 * edge))()
    lib().set_threads(threads)
    try:
        lib().fill(ctypes.addressof(buffer) + edge, size)
        assert lib().read_bandwidth(ctypes.addressof(buffer) + edge, size, 2) > 0
    finally:
        lib().set_threads(before)
    assert bytes(buffer) == bytes(edge) + b"\1" * size + bytes(edge)


@native
def test_what_cannot_be_measured_raises() -> None:
    with pytest.raises(RuntimeError):
        lib().read_bandwidth(0, 4096)
    buffer = (ctypes.c_uint8 * 128)()
    with pytest.raises(RuntimeError):
        lib().read_bandwidth(ctypes.addressof(buffer), 32)
    with pytest.raises(RuntimeError):
        lib().read_bandwidth(ctypes.addressof(buffer), 128, 0)
    assert lib().c.rd_peak(3) < 0
    assert lib().c.rd_peak(-1) < 0
