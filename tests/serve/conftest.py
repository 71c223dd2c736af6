from __future__ import annotations

import time
from collections.abc import Iterator

import openai
import pytest

from redraft.llm import LLM
from tests.checkpoints import tiny_llama
from tests.serve.live import Live


@pytest.fixture(scope="session")
def llm() -> LLM:
    """The model, for comparisons. Its own engine does not run while a server's engine runs."""
    return LLM("embedded", dtype="float32", max_model_len=512, cache_memory=16 << 20, draft="token-recycling")


@pytest.fixture(scope="session")
def _live(llm: LLM) -> Iterator[Live]:
    with Live(llm.sibling()) as live:
        yield live


class Clock:
    """ahead: seconds, added to the time that replies under way see. They are late when it exceeds request_timeout."""

    ahead = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("redraft.serve.stream.monotonic", lambda: time.monotonic() + made.ahead)
    return made


@pytest.fixture
def live(_live: Live) -> Iterator[Live]:
    """A server with default settings. After each test it must be idle and empty."""
    yield _live
    _live.settle()


@pytest.fixture(scope="session")
def _filling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    path = tiny_llama(tmp_path_factory.mktemp("filling") / "coder", marks=("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>"))
    with Live(LLM(str(path), dtype="float32", threads=1, cache_memory=4 << 20, draft="copyspec")) as live:
        yield live


@pytest.fixture
def filling(_filling: Live) -> Iterator[Live]:
    """A server whose model, called coder, has marks for filling in the middle."""
    yield _filling
    _filling.settle()


@pytest.fixture(scope="session")
def _client(_live: Live) -> Iterator[openai.OpenAI]:
    with _live.client() as client:
        yield client


@pytest.fixture
def client(live: Live, _client: openai.OpenAI) -> openai.OpenAI:
    return _client
