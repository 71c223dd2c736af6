from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from redraft.llm import LLM
from tests.serve.live import Live


@pytest.fixture(scope="session")
def llm() -> LLM:
    """The model, for comparisons. Its own engine does not run while a server's engine runs."""
    return LLM("embedded", dtype="float32", max_model_len=512, cache_memory=16 << 20, draft="token-recycling")


@pytest.fixture(scope="session")
def _live(llm: LLM) -> Iterator[Live]:
    with Live(llm.sibling()) as live:
        yield live


@pytest.fixture
def live(_live: Live) -> Iterator[Live]:
    """A server with default settings. After each test it must be idle and empty."""
    yield _live
    _live.settle()


@pytest.fixture(scope="session")
def _client(_live: Live) -> Iterator[openai.OpenAI]:
    with _live.client() as client:
        yield client


@pytest.fixture
def client(live: Live, _client: openai.OpenAI) -> openai.OpenAI:
    return _client
