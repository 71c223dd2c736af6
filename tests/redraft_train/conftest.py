from __future__ import annotations

from pathlib import Path

import pytest

from redraft import LLM

LINES = ["def add(a, b):", "class Stack:", "import os, sys", "for i in range(10):", "The purpose of this PEP is", "x = [1, 2"]


@pytest.fixture(scope="session")
def llm() -> LLM:
    return LLM("embedded", dtype="float32", prefix_sharing=False, cache_memory=1 << 26, max_seqs=8)


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(LINES) + "\n")
    return path
