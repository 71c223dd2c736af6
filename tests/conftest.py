"""Set before other imports: one thread (two test runs on two cores must not compete), no network, no progress bars in
output that is compared."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="redraft-tests-")  # measured times: none from before
os.environ["COLUMNS"] = "200"  # wide enough that no line of a table is broken


SLOW = "tests/ops/test_kernels.py", "tests/contracts/"  # files that begin first, so that no worker is left with one at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(SLOW))


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
