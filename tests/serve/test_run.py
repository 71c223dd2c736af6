"""Which signals end a server."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn

from redraft.serve.run import Server


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
