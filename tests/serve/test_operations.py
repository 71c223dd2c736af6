"""The endpoints for operators of a server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from redraft import SamplingParams
from redraft.core.sequence import Request
from redraft.errors import Unavailable
from redraft.serve.metrics import Metrics
from redraft.serve.shell import Shell
from redraft.workers.host import Figures
from tests.serve.raw import Live, live


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(api_key=("a-key",), root_path="/llm", step_timeout=0.2) as made:
        yield made


def test_the_root_lists_all_endpoints(server: Live) -> None:
    key = {"Authorization": "Bearer a-key"}
    index = server.ask("GET", "/").json  # no key is needed
    listed = {(one["method"], one["path"]) for one in index["endpoints"]}
    document = server.ask("GET", "/openapi.json", **key).json
    assert listed == {(method.upper(), path.replace(":path", "")) for path, methods in document["paths"].items() for method in methods}
    assert all(one["about"] for one in index["endpoints"])


def test_health_fails_while_a_step_does_not_end(server: Live) -> None:
    assert server.ask("GET", "/health").status == 200
    hold = threading.Event()
    loop = server.service.host.loop
    loop.call_soon_threadsafe(lambda: loop.create_task(server.service.host.call(lambda: hold.wait(30))))
    server.until(lambda: server.ask("GET", "/health").status == 503)
    assert "step_timeout" in server.ask("GET", "/health").json["error"]["message"]
    hold.set()
    server.until(lambda: server.ask("GET", "/health").status == 200)


def test_opened_methods_are_counted_with_their_memory() -> None:
    metrics = Metrics("x:", "m", ("0",), lambda: {"0": Figures(opened=3, opened_bytes=4096)})
    text = "".join(line for line in metrics.exposition().decode().splitlines(True) if "opened_methods" in line)
    assert 'x:opened_methods{engine="0",model_name="m"} 3.0' in text
    assert 'x:opened_methods_bytes{engine="0",model_name="m"} 4096.0' in text


def test_what_a_worker_counts_in_its_next_life_is_added() -> None:
    first, second = Figures(preemptions=10, copied=3), Figures(starts=2, preemptions=2, found=4)
    lives = iter([first, second.after(first)])
    metrics = Metrics("x:", "m", ("0",), lambda: {"0": next(lives)})
    for total in (10, 12):
        assert f'x:num_preemptions_total{{engine="0",model_name="m"}} {total}.0' in metrics.exposition().decode()


class Elsewhere:
    """A host whose second worker has every request."""

    workers, alive, free = ("0", "1"), True, 1

    async def add(self, requests: Any) -> None:
        pass

    def abort(self, request_id: str) -> None:
        pass

    def worker(self, request_id: str) -> str:
        return "1"


def test_requests_that_end_without_a_token_are_counted_for_their_worker() -> None:
    metrics = Metrics("x:", "m", Elsewhere.workers, dict)
    shell = Shell(cast(Any, Elsewhere()), metrics, max_queue=4, max_seqs=1)
    one, other = asyncio.run(shell.submit(Request("a", [1], SamplingParams()), Request("b", [1], SamplingParams())))
    shell.forget(one)
    shell.fail(Unavailable("gone"))
    text = metrics.exposition().decode()
    for reason in ("abort", "error"):
        assert f'x:request_success_total{{engine="1",finished_reason="{reason}",model_name="m"}} 1.0' in text
    assert not other.queue.empty()
