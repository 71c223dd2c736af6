"""Set before other imports: one thread (two test runs on two cores must not compete), no network, no progress bars in
output that is compared."""

import gc
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="redraft-tests-")  # measured times: none from before
os.environ["COLUMNS"] = "200"  # wide enough that no line of a table is broken


SLOW = "tests/ops/test_native.py", "tests/ops/test_kernels.py", "tests/contracts/", "tests/test_install.py", "tests/workers/"
# files that begin first, so that no worker is left with one at the end


TORCH = find_spec("torch") is not None
CHROMIUM = shutil.which("chromium")
BROWSER = CHROMIUM is not None and find_spec("playwright") is not None
RAY = find_spec("ray") is not None and find_spec("pyarrow") is not None
TRAINS_WITHOUT = "budget|cli|conflicts|progress|states|texts|verbs"  # modules of redraft_train that do not import PyTorch
IMPORTS_TORCH = re.compile(
    rf"^(import|from) (torch\b|safetensors\.torch|redraft\.ops\.(torch_|reference)|redraft_train\.(?!({TRAINS_WITHOUT})\b))", re.MULTILINE
)
IMPORTS_RAY = re.compile(r"^(import|from) (pyarrow|ray)\b", re.MULTILINE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(SLOW))
    for item in items:
        if not TORCH and (item.get_closest_marker("torch") or {"torch", "reference"} & set(_backends(item))):
            item.add_marker(pytest.mark.skip(reason="needs PyTorch"))
        if not BROWSER and item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason="needs Chromium and playwright"))


def pytest_collection_finish() -> None:
    """What the collection made lives until the end, so collections of garbage need not look at it."""
    gc.collect()
    gc.freeze()


def _backends(item: pytest.Item) -> Iterator[Any]:
    """The backends that the parameters of a test name."""
    for name, value in (item.callspec.params if hasattr(item, "callspec") else {}).items():
        yield value if name == "backend" else value.get("backend") if isinstance(value, dict) else getattr(value, "backend", None)


def pytest_configure(config: pytest.Config) -> None:
    for installed, imports in ((TORCH, IMPORTS_TORCH), (RAY, IMPORTS_RAY)):
        if not installed:
            config.option.ignore = [*(config.option.ignore or ()), *map(str, _left_out(config, imports))]


def _left_out(config: pytest.Config, imports: re.Pattern[str]) -> list[Path]:
    """A file that imports a package by itself is left out where it is not installed."""
    files = (file for folder in ("redraft", "tests") for file in (config.rootpath / folder).rglob("*.py"))
    return sorted(file for file in files if imports.search(file.read_text()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    in_browser = (file for file in (config.rootpath / "tests").rglob("*_in_chromium.py"))
    lacking = [
        (TORCH, "PyTorch", _left_out(config, IMPORTS_TORCH)),
        (RAY, "Ray", _left_out(config, IMPORTS_RAY)),
        (BROWSER, "Chromium and playwright", sorted(in_browser)),
    ]
    for what, files in ((what, files) for installed, what, files in lacking if not installed):
        left = {file: count for file in files if (count := file.read_text().count("\ndef test_"))}
        terminalreporter.write_line(f"not run, they need {what}: {sum(left.values())} test functions in {len(left)} files")
        for file, count in left.items():
            terminalreporter.write_line(f"  {file.relative_to(config.rootpath)}: {count}")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Makes Ctrl-C work as at a terminal, here and in processes that the test starts. Background jobs start with SIGINT ignored, and
    child processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def redraft(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: exit code, stdout, stderr."""
    from redraft.cli.main import run

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(arguments)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call
