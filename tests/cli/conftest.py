from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import tiny_llama

Ran = tuple[int, str, str]  # exit code, stdout, stderr


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("tiny") / "llama", seed=5))  # its texts hold escape characters


def start(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    """Runs a command line as a user does."""
    return subprocess.Popen([sys.executable, "-m", "redraft", *arguments], cwd=Path(__file__).parents[2], **options)  # type: ignore[call-overload]
