from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from redraft.cli.main import run
from tests.checkpoints import tiny_llama

Ran = tuple[int, str, str]  # exit code, stdout, stderr


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("tiny") / "llama"))


@pytest.fixture
def redraft(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command line in this process."""

    def call(*arguments: str) -> Ran:
        code = run(arguments)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def start(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    """Runs a command line as a user does."""
    return subprocess.Popen([sys.executable, "-m", "redraft", *arguments], cwd=Path(__file__).parents[2], **options)  # type: ignore[call-overload]
