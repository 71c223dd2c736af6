"""Ray clusters: ours is closed to others and leaves nothing behind; one that is open to all is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from redraft.config import EngineConfig
from redraft.errors import InvalidInput, Unavailable, Unsupported
from redraft.workers import ray_cluster
from redraft.workers.ray_cluster import RayCluster, connect
from tests.workers.ray_heads import head

LISTENS = "0A"  # a state of a socket in /proc/net/tcp
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")


def listening(parent: int) -> set[str]:
    """The addresses, in hexadecimal, on which the process and those below it listen."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {parent}
    while more := {child for child, above in parents.items() if above in family} - family:
        family |= more
    inodes = set()
    for process in family:
        for file in Path(f"/proc/{process}/fd").glob("*"):
            try:
                inodes.add(os.readlink(file))
            except OSError:
                continue
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {line[1].partition(":")[0] for line in lines if line[3] == LISTENS and f"socket:[{line[9]}]" in inodes}


def test_a_cluster_of_ours(home: Path) -> None:
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    with connect(at_least=99) as cluster:
        assert cluster.cpus == (99,) and cluster.folder is not None
        token = cluster.folder / "auth_token"
        assert (cluster.folder.stat().st_mode & 0o777, token.stat().st_mode & 0o777) == (0o700, 0o600)
        address = f"127.0.0.1:{cluster.address.rpartition(':')[2]}"
        assert ray_cluster._probe(address, "disabled") == "refused" and ray_cluster._probe(address, "token") == "accepted"
        assert (found := listening(os.getpid())) and found <= set(LOOPBACK)
        with pytest.raises(InvalidInput, match="connected to a Ray cluster already"), connect():
            pass
        assert not ray.is_initialized() or ray.cluster_resources()["CPU"] == 99  # the inner one ended nothing
    assert not cluster.folder.exists() and not list(home.iterdir()) and not ray.is_initialized()
    assert dict(os.environ) == before and signal.getsignal(signal.SIGTERM) is handler


SLEEPS = """
import time
from redraft.workers.ray_cluster import connect
with connect() as cluster:
    print(cluster.folder, flush=True)
    time.sleep(300)
"""


def test_sigterm_ends_a_cluster_of_ours(home: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEPS], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        folder = process.stdout.readline().strip()
        assert Path(folder).is_dir()
        process.terminate()
        assert process.wait(300) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()
    assert not Path(folder).exists() and not list(home.iterdir())
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if folder.encode() in command]


@pytest.mark.usefixtures("home")
def test_a_cluster_with_a_token(closed: str, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "0" * 64):
        monkeypatch.setenv("RAY_AUTH_TOKEN", value)
        with pytest.raises(InvalidInput, match=f"ray-address = {closed}: there is no token, or another"), connect(closed):
            pass
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setenv("RAY_ADDRESS", closed)
    with connect() as cluster:
        assert cluster.folder is None and cluster.cpus == (2,)
    assert ray_cluster._probe(closed, "token") == "accepted"  # it goes on without us


@pytest.mark.usefixtures("home")
def test_a_cluster_that_is_open_to_all_is_refused() -> None:
    with head(None) as address, pytest.raises(Unsupported, match="executes the code of anybody who reaches it"), connect(address):
        pass


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("address", ["nonsense", "a b:1", "127.0.0.1", "127.0.0.1:", "ray://127.0.0.1:1", ":1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InvalidInput, match="HOST:PORT is needed"), connect(address):
        pass


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999", "none.invalid:1"])
def test_where_no_cluster_answers(address: str) -> None:
    with pytest.raises(Unavailable, match="no Ray cluster answers"), connect(address):
        pass


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"pip install 'redraft\[cluster\]'"), connect():
        pass


@pytest.mark.parametrize(
    ("cpus", "replicas", "each"),
    [((2,), 1, 2), ((2,), 2, 1), ((8, 8), 2, 8), ((8, 8), 3, 4), ((4, 2), 2, 2), ((4, 2), 6, 1), ((16, 1, 1), 4, 4)],
)
def test_processors_of_each_engine(cpus: tuple[int, ...], replicas: int, each: int) -> None:
    cluster = RayCluster("", None, cpus)
    assert cluster.cpus_each(replicas) == each
    assert cluster.cpus_each(replicas, each) == each
    with pytest.raises(InvalidInput, match=f"replicas = {replicas} with {each + 1} threads each: the cluster's nodes have"):
        cluster.cpus_each(replicas, each + 1)


def test_more_engines_than_processors() -> None:
    with pytest.raises(InvalidInput, match="replicas = 7: the cluster's nodes have 4, 2 CPUs"):
        RayCluster("", None, (4, 2)).cpus_each(7)


def test_places() -> None:
    config = EngineConfig.of(cache_fraction=0.6)
    found, cpus, gpus = RayCluster("", None, (8, 8)).placed(config, 4)
    assert (found.model.threads, cpus, gpus) == (4, 4, 0) and found.cache.fraction == pytest.approx(0.3)  # two on each node
    assert RayCluster("", None, (8,)).placed(EngineConfig.of(cache_memory="1GB"), 4)[0].cache.memory == 10**9
    assert RayCluster("", None, (8,), gpus=2).placed(config, 2)[2] == 1
    assert RayCluster("", None, (8,), gpus=2).placed(config, 3)[2] == 0
    assert RayCluster("", None, (8,)).placed(EngineConfig.of(device="cuda", threads=3), 2)[1:] == (3, 1)
    with pytest.raises(InvalidInput, match="Ray chooses the GPU"):
        RayCluster("", None, (8,)).placed(EngineConfig.of(device="cuda:1"), 1)
