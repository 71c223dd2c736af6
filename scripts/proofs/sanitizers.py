"""The kernels under sanitizers of addresses, undefined behaviour and threads, for each instruction set that this machine has; and the
compiled planner under those of addresses and undefined behaviour.

The suite runs the best set only (tests/ops/test_kernels.py). Takes about three minutes.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from redraft.ops import library

SOURCES = Path(library.__file__).parents[1] / "draft" / "native"
PLANNER = "tests/draft/test_compiled.py"


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "planner":
        loaded = SimpleNamespace(c=ctypes.CDLL(sys.argv[2]))
        library.load = lambda: loaded  # type: ignore[assignment,return-value]
        sys.exit(pytest.main([PLANNER, "-v", "-s"]))
    os.environ["REDRAFT_EVERY_SET"] = "1"  # before the tests are imported
    kernels = int(pytest.main(["tests/ops/test_kernels.py", "-v", *sys.argv[1:]]))
    sys.exit(max(kernels, planner()))


def planner() -> int:
    """Runs the planner's tests in a process that has the sanitizers."""
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/planner.so"
        options = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fPIC", "-shared", "-ffp-contract=off"]
        subprocess.run([compiler, *options, *map(str, SOURCES.glob("*.cpp")), "-o", out], check=True)
        found = subprocess.run([compiler, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True).stdout.strip()
        env = {**os.environ, "LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0"}  # Python itself leaks
        return subprocess.run([sys.executable, "scripts/prove", "sanitizers", "planner", out], env=env, check=False).returncode


if __name__ == "__main__":
    main()
