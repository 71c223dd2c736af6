"""Before anything else is imported: one thread (two test runs on two cores must not spin against each other), no network,
no progress bars in what is compared."""

import os
from collections.abc import Callable

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["COLUMNS"] = "200"  # no line of a table is broken, whatever reads it


@pytest.fixture
def redraft(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: exit code, stdout, stderr."""
    from redraft.cli.main import run

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(arguments)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call
