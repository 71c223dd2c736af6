"""The endpoints for operators of a server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from redraft.serve.metrics import Metrics
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
    loop = server.service.shell._loop
    loop.call_soon_threadsafe(lambda: loop.create_task(server.service.shell.call(lambda: hold.wait(30))))
    server.until(lambda: server.ask("GET", "/health").status == 503)
    assert "step_timeout" in server.ask("GET", "/health").json["error"]["message"]
    hold.set()
    server.until(lambda: server.ask("GET", "/health").status == 200)


def test_opened_methods_are_counted_with_their_memory() -> None:
    metrics, opened = Metrics("x:", "m"), SimpleNamespace(count=3, bytes=4096)
    engine = SimpleNamespace(opened=opened, running=[], waiting=[], preemptions=0)
    table = SimpleNamespace(shared=lambda: 0, prefix=SimpleNamespace(nodes={}))
    engine.memory = SimpleNamespace(used=lambda: 0, blocks=1, paged=SimpleNamespace(table=table))
    metrics.watch(engine)  # type: ignore[arg-type]
    text = "".join(line for line in metrics.exposition().decode().splitlines(True) if "opened_methods" in line)
    assert 'x:opened_methods{engine="0",model_name="m"} 3.0' in text
    assert 'x:opened_methods_bytes{engine="0",model_name="m"} 4096.0' in text
