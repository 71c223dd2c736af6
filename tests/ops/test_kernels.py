"""The kernels as separate programs under sanitizers: addresses and undefined behaviour for the best instruction set of this machine
(`scripts/prove sanitizers`: for each set), threads once, because shared state does not depend on the instruction set."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest

CPU = Path(__file__).parents[2] / "redraft/ops/cpu"
COMPILER = shutil.which(os.environ.get("CXX") or "g++")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
SETS = {  # what Linux calls the bits that it takes, and its flags
    "avx2": ("avx2 fma f16c", AVX2),
    "avx512": ("avx512f avx512bw avx512dq avx512vl", AVX512),
    "avx512_vnni": ("avx512f avx512bw avx512dq avx512vl avx512_vnni", [*AVX512, "-mavx512vnni"]),
    "avx512_bf16": ("avx512_bf16 avx512_vnni", [*AVX512, "-mavx512bf16", "-mavx512vnni"]),
}
BITS512 = SETS["avx512"][0]
EMULATED = "avx512_bf16 emulated"  # the same code, its two instructions in plain AVX-512
EVERY_SET = bool(os.environ.get("REDRAFT_EVERY_SET"))
PROGRAMS = {  # sources beside it, and its arguments: a seed and the number of rounds (this seed draws short contexts)
    "kernels_test": (["pack.cpp", "layers.cpp", "mlp.cpp", "attend.cpp", "threads.cpp"], ["1", "2" if EVERY_SET else "1"]),
    "attend_test": (["attend.cpp", "threads.cpp"], ["4", "3" if EVERY_SET else "2"]),
}

UNKNOWN = "unexpected memory mapping"  # older runtimes do not know the addresses that newer kernels give


PATTERN = "-ftrivial-auto-var-init=pattern"  # variables start with bits that no result survives; gcc 12, clang 8
FILLED = "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=4000000000"  # memory starts as NaN; pools of threads outlive tests


def patterned() -> list[str]:
    assert COMPILER is not None
    tried = subprocess.run([COMPILER, PATTERN, "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True, check=False)
    return [PATTERN] if tried.returncode == 0 else []


def has(words: str) -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and set(words.split()) <= set(re.findall(r"\w+", info.read_text()))


def best(program: str) -> str:
    """The last set that this machine has. The attention kernels of avx512_bf16 also run emulated."""
    sets = [isa for isa, (bits, _) in SETS.items() if has(bits)]
    return EMULATED if program == "attend_test" and sets[-1] in ("avx512", "avx512_vnni") else sets[-1]


@pytest.mark.skipif(COMPILER is None, reason="no g++ here")
def test_tiles_emulated(tmp_path: Path) -> None:
    """The AMX code on emulated tiles, on a machine with AVX-512 BF16 and without AMX. The program must notice planted mistakes."""
    bits, flags = SETS["avx512_bf16"]
    if not has(bits):
        pytest.skip("this machine has no avx512_bf16")
    sources = [CPU / "test/amx_test.cpp", *(CPU / name for name in ("amx.cpp", "avx512_bf16.cpp", "pack.cpp", "threads.cpp"))]
    common = ["-std=c++17", "-O0", "-ffp-contract=off", "-pthread", "-w", "-mbmi2", "-DREDRAFT_EMULATE_TILES"]
    assert COMPILER is not None
    made = subprocess.run([COMPILER, *common, *flags, *sources, "-o", tmp_path / "amx"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    done = subprocess.run([tmp_path / "amx", "1", "60"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"^\d\d+ cases, 0 failed$", done.stdout, re.MULTILINE) and done.stdout.count("noticed: ") >= 7


@pytest.mark.skipif(COMPILER is None, reason="no g++ here")
@pytest.mark.parametrize(("program", "isa"), [*product(PROGRAMS, SETS), ("attend_test", EMULATED)])
def test_clean_under_sanitizers(program: str, isa: str, tmp_path: Path) -> None:
    bits, flags = (BITS512, [*AVX512, "-DREDRAFT_EMULATE_BF16"]) if isa == EMULATED else SETS[isa]
    beside, words = PROGRAMS[program]
    source = CPU / "test" / f"{program}.cpp"
    if not has(bits):
        pytest.skip(f"this machine has no {isa}")
    if not EVERY_SET and isa != best(program):
        pytest.skip("a better set is tried; scripts/prove sanitizers tries every one")
    if not source.exists():
        pytest.skip(f"no {source.name}")
    assert COMPILER is not None
    common = ["-std=c++17", "-O0", "-ffp-contract=off", "-pthread", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [source, *(CPU / name for name in beside)]
    common += patterned()
    made = subprocess.run([COMPILER, *common, *flags, *sources, "-o", tmp_path / program], capture_output=True, text=True, check=False)
    if "cannot find -lasan" in made.stderr or "cannot find -lubsan" in made.stderr:
        pytest.skip("the compiler has no sanitizers here")
    assert made.returncode == 0, made.stderr[-2000:]
    environment = {**os.environ, "ASAN_OPTIONS": FILLED}
    done = subprocess.run([tmp_path / program, *words], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    passed = re.fullmatch(r"(\d+) passed, 0 failed", done.stdout.strip().splitlines()[-1])
    assert passed and int(passed[1]) > 50


@pytest.mark.skipif(COMPILER is None, reason="no g++ here")
@pytest.mark.parametrize("against", ["a definition", "the processor"])
def test_the_emulated_bf16_instructions(against: str, tmp_path: Path) -> None:
    bits, flags = SETS["avx512" if against == "a definition" else "avx512_bf16"]
    if not has(bits):
        pytest.skip(f"this machine has no {bits}")
    assert COMPILER is not None
    common = ["-std=c++17", "-O1", "-ffp-contract=off", "-w"]
    made = subprocess.run(
        [COMPILER, *common, *flags, CPU / "test/bf16_test.cpp", "-o", tmp_path / "bf16"], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-2000:]
    done = subprocess.run([tmp_path / "bf16"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and re.fullmatch(r"\d{7} passed, 0 failed", done.stdout.strip()), done.stdout[-2000:]


@pytest.mark.skipif(COMPILER is None, reason="no g++ here")
@pytest.mark.parametrize(("program", "words"), [("kernels_test", ["1", "1"]), ("attend_test", ["1", "1"])])
def test_no_thread_meets_another(program: str, words: list[str], tmp_path: Path) -> None:
    bits, flags = SETS["avx2"]
    if not has(bits):
        pytest.skip("this machine has no avx2")
    assert COMPILER is not None
    common = ["-std=c++17", "-O1", "-ffp-contract=off", "-pthread", "-w", "-fsanitize=thread"]
    sources = [CPU / "test" / f"{program}.cpp", *(CPU / name for name in PROGRAMS[program][0])]
    made = subprocess.run([COMPILER, *common, *flags, *sources, "-o", tmp_path / program], capture_output=True, text=True, check=False)
    if "cannot find -ltsan" in made.stderr or "libtsan_preinit.o" in made.stderr:
        pytest.skip("the compiler has no sanitizer of threads here")
    assert made.returncode == 0, made.stderr[-2000:]
    done = subprocess.run([tmp_path / program, *words], capture_output=True, text=True, check=False)
    if UNKNOWN in done.stderr:
        pytest.skip(f"the sanitizer of threads does not run on this kernel: {UNKNOWN}")
    assert done.returncode == 0 and "WARNING: ThreadSanitizer" not in done.stderr, done.stdout[-1000:] + done.stderr[-4000:]
    assert re.search(r"^\d\d+ passed, 0 failed$", done.stdout, re.MULTILINE)
