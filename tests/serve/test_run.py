"""Which signals end a server."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn

from redraft.config import SamplingParams
from redraft.llm import LLM
from redraft.models.memory import size
from redraft.serve.run import Server, described


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.default_int_handler])
def test_sigint_ends_a_server_unless_it_was_ignored_at_the_start(before: Any) -> None:
    old = signal.signal(signal.SIGINT, before)
    try:
        served = Server(uvicorn.Config(cast(Any, None)), cast(Any, SimpleNamespace(shell=SimpleNamespace(draining=False))))
    finally:
        signal.signal(signal.SIGINT, old)
    served.handle_exit(signal.SIGINT, None)
    assert served.should_exit == served.service.shell.draining == (before is not signal.SIG_IGN)
    served.handle_exit(signal.SIGTERM, None)
    assert served.should_exit and served.service.shell.draining


def test_a_server_says_what_runs_and_how_large_its_cache_is() -> None:
    llm = LLM("embedded", backend="numpy", draft="copyspec", draft_rows=4, cache_memory="16MB", max_model_len=512)
    first, second = described(llm, "toy", ("0",), SamplingParams())
    assert first == f"toy: backend numpy, draft copyspec with 4 rows, {llm.guarantee.label}"
    blocks = llm.runner.memory.blocks
    bytes_held = size(blocks * llm.runner.backend.block_bytes(llm.runner.spec))
    assert second == f"cache of {bytes_held}, {32 * blocks} tokens; texts of up to 512 tokens" and bytes_held.endswith("MiB")
