"""Before anything else is imported: one thread (two test runs on two cores must not spin against each other), no network,
no progress bars in what is compared."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["COLUMNS"] = "200"  # no line of a table is broken, whatever reads it


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as at a terminal, here and in processes that the test starts. A job in the background starts with SIGINT ignored, and a
    child inherits that."""
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
