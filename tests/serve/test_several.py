"""A server with two worker processes, over HTTP: the texts of one engine, adapters in all workers, figures of each, restarts under way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from redraft import LLM, SamplingParams
from redraft.config import EngineConfig
from redraft.workers.cluster import Cluster
from redraft.workers.link import Process
from redraft.workers.several import workers_of
from tests import adapters, checkpoints
from tests.serve.live import Live, soon

STAGES = {"0": (0,), "1": (0,)}
PROMPT = "the cat sat on the mat and the cat sat on the log"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("several")
    base = checkpoints.tiny_llama(top / "own", hidden_size=64, intermediate_size=96)
    for seed, name in enumerate("xy"):
        adapters.make(top / "a" / name, base, seed=seed)
    return top


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(config=config(folder))


def config(folder: Path) -> EngineConfig:
    return EngineConfig.of(
        model=str(folder / "own"), dtype="float32", cache_memory=1 << 23, draft="copyspec",
        lora={"x": str(folder / "a" / "x")},
    )  # fmt: skip


@pytest.fixture(scope="module")
def several(folder: Path) -> Iterator[Live]:
    front, cluster = workers_of(config(folder), STAGES, "round-robin", SamplingParams(), 60.0)
    with Live(front, cluster, served_model_name=("tiny",), lora_dir=folder / "a", admin_key="the-admin-key") as made:
        yield made


def cluster_of(live: Live) -> Cluster:
    return cast(Cluster, live.service.host)


def ask(live: Live, path: str, body: Any = None, key: str = "") -> Any:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(f"{live.url}{path}", data, headers), timeout=300) as reply:
        text = reply.read().decode()
    return json.loads(text) if reply.headers["Content-Type"].startswith("application/json") else text


def complete(live: Live, **body: Any) -> str:
    reply = ask(live, "/v1/completions", {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 1, **body})
    return str(reply["choices"][0]["text"])


def settle(live: Live) -> None:
    cluster = cluster_of(live)
    soon(lambda: not live.service.shell.busy and all(member.ready for member in cluster.members))

    def held() -> list[tuple[int, int]]:
        return asyncio.run_coroutine_threadsafe(cluster.check(), cluster.loop).result(30)

    soon(lambda: held() == [(0, 0), (0, 0)])


def test_many_clients_get_their_texts_while_a_worker_is_killed_and_all_restart(several: Live, llm: LLM) -> None:
    right = [llm.generate(PROMPT, temperature=1, seed=i, max_tokens=40)[0].outputs[0].text for i in range(24)]
    cluster = cluster_of(several)
    with ThreadPoolExecutor(12) as pool:
        texts = [pool.submit(complete, several, seed=i) for i in range(24)]
        link = cast(Process, cluster.members[0].link)
        os.kill(link.process.pid, signal.SIGKILL)
        asyncio.run_coroutine_threadsafe(cluster.restart(), cluster.loop).result(60)
        assert [text.result(60) for text in texts] == right
    settle(several)
    info = ask(several, "/server_info")["workers"]
    assert [worker["ready"] for worker in info] == [True, True] and sum(worker["starts"] for worker in info) >= 4
    figures = ask(several, "/metrics")
    for name in STAGES:
        assert f'redraft:worker_ready{{engine="{name}",model_name="tiny"}} 1.0' in figures
        assert f'redraft:request_success_total{{engine="{name}",finished_reason="length",model_name="tiny"}}' in figures
    assert len(right) == sum(
        float(line.rpartition(" ")[2]) for line in figures.splitlines() if line.startswith("redraft:request_success_total{")
    )


def test_adapters_are_loaded_in_all_workers_and_again_after_a_restart(several: Live, folder: Path) -> None:
    plain = LLM(config=config(folder).but(model=config(folder).model.but(lora={n: str(folder / "a" / n) for n in "xy"})))
    right = {name: plain.generate(PROMPT, temperature=1, seed=5, max_tokens=40, lora=name)[0].outputs[0].text for name in "xy"}
    assert len({*right.values(), complete(several, seed=5)}) == 3
    ask(several, "/v1/load_lora_adapter", {"lora_name": "y"}, key="the-admin-key")
    cluster = cluster_of(several)
    for _ in range(2):
        assert [complete(several, seed=5, model=name) for name in "xyxy"] == [right[name] for name in "xyxy"]
        asyncio.run_coroutine_threadsafe(cluster.restart(), cluster.loop).result(60)
        settle(several)
    ask(several, "/v1/unload_lora_adapter", {"lora_name": "y"}, key="the-admin-key")
    with pytest.raises(HTTPError, match="404"):
        complete(several, seed=5, model="y")
    assert ask(several, "/server_info")["adapters"] == ["x"]
    settle(several)


def test_what_a_worker_refuses_is_refused_as_by_one_engine(several: Live) -> None:
    for body in ({"prompt": [1 << 20]}, {"prompt": PROMPT * 40}, {"cache": {"keep": "streaming-llm:sinks=1,recent=8", "codec": "int4"}}):
        with pytest.raises(HTTPError) as found:
            complete(several, **body)
        assert found.value.code == 400 and json.loads(found.value.read())["error"]["message"]
    settle(several)


def test_prefixes_of_all_workers_are_dropped(several: Live) -> None:
    for _ in range(2):  # one for each worker
        complete(several, prompt=PROMPT * 3, max_tokens=2)
    assert ask(several, "/reset_prefix_cache", {})["pages"] >= 2
    assert ask(several, "/reset_prefix_cache", {})["pages"] == 0


def test_the_command_serves_restarts_on_sighup_and_ends_with_its_workers(tmp_path: Path) -> None:
    socket = tmp_path / "s"
    command = [sys.executable, "-m", "redraft", "serve", "embedded", "--replicas", "2", "--uds", str(socket), "--cache-memory", "32MB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert any("Uvicorn running" in line for line in iter(process.stderr.readline, ""))
            first = children(process.pid)
            assert len(first) == 2
            process.send_signal(signal.SIGHUP)
            soon(lambda: len(now := children(process.pid)) == 2 and not set(now) & set(first))
            process.kill()
            process.wait()
            soon(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children(process.pid)))
        finally:
            process.kill()
            process.stderr.close()


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def test_a_model_that_no_worker_can_load_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "redraft", "serve", str(tmp_path / "absent"), "--replicas", "2", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode and "absent" in done.stderr and "Traceback" not in done.stderr
