"""A Ray cluster: one that runs, or one that is started on this machine and ends with the program. A cluster executes the code that it is
sent, so one that takes code from anybody is refused."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from redraft.config import EngineConfig
from redraft.errors import InvalidInput, Unavailable, Unsupported, shown

ANSWERS = 5.0  # seconds within which a cluster accepts a connection
PROBED = 30.0  # seconds that a probe may take, Python's start included
STORE = 256 << 20  # bytes of shared memory for prompts and results, in a cluster that is started here
LONGEST_FOLDER = 36  # characters; the path of a socket has at most 107, of which the end of Ray's has 69
LOCAL = "127.0.0.1", "::1"
SURE = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_AUTO_CONNECT": "0"}
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0, on any system: all listens on the loopback interface only

PROBE = """
import sys
from ray._raylet import AuthenticationTokenLoader, GcsClient
from ray.exceptions import AuthenticationError
try:
    if sys.argv[2] == "token" and not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        raise AuthenticationError("Ray itself would end the process")
    GcsClient(address=sys.argv[1]).internal_kv_get(b"session_name", b"session", timeout=10)
    print("accepted")
except AuthenticationError:
    print("refused")
"""


@dataclass(frozen=True)
class RayCluster:
    """A cluster to which this process is connected. folder: of one that was started here; cpus: of each node; gpus: of all."""

    address: str
    folder: Path | None
    cpus: tuple[int, ...]
    gpus: int = 0

    def cpus_each(self, replicas: int, wanted: int | None = None) -> int:
        """CPUs for each of `replicas` actors: as many as there is room for, or `wanted`. InvalidInput if there is no room.

        >>> RayCluster("", None, (4, 2)).cpus_each(2)
        2
        """
        for each in range(max(self.cpus, default=0), 0, -1) if wanted is None else (wanted,):
            if sum(cpus // each for cpus in self.cpus) >= replicas:
                return each
        threads = "" if wanted is None else f" with {wanted} threads each"
        raise InvalidInput(f"replicas = {replicas}{threads}: the cluster's nodes have {', '.join(map(str, self.cpus))} CPUs")

    def placed(self, config: EngineConfig, replicas: int) -> tuple[EngineConfig, int, int]:
        """The configuration of each of `replicas` engines, its CPUs and its GPUs. InvalidInput if there is no room for so many."""
        model = config.model
        if model.device.startswith("cuda:"):
            raise InvalidInput(f"device = {model.device}: on a cluster Ray chooses the GPU; cuda is allowed")
        cpus = self.cpus_each(replicas, model.threads)
        gpus = int(model.device == "cuda" or (model.device == "auto" and self.gpus >= replicas))
        on_one_node = min(replicas, max(self.cpus) // cpus)
        lora = tuple(f"{name}={_absolute(folder)}" for name, folder in model.adapters.items())
        model = model.but(threads=cpus, lora=lora, model=_absolute(model.model))
        cache = config.cache if config.cache.memory is not None else config.cache.but(fraction=config.cache.fraction / on_one_node)
        return config.but(model=model, cache=cache, draft_model=config.draft_model and _absolute(config.draft_model)), cpus, gpus


def _absolute(path: str) -> str:
    """The path of a file or folder from wherever an actor runs; what is none is as it was."""
    return str(Path(path).resolve()) if Path(path).exists() else path


@contextmanager
def connect(address: str | None = None, at_least: int = 1) -> Iterator[RayCluster]:
    """Connects this process until the end of the block. SIGTERM raises SystemExit in the main thread meanwhile, so that it ends too.

    address: HOST:PORT of a cluster that has a node on this machine. Its token is found as Ray finds it. None: that of RAY_ADDRESS, else a
    cluster is started, with the CPUs that the process may use, and `at_least` so many. It listens on the loopback interface only. Its
    files and its token are in a temporary folder, which is removed at the end; nothing is written to ~/.ray.
    Unsupported without Ray, or if the cluster asks for no token; Unavailable if it does not answer; InvalidInput for what is no address
    or another token.
    """
    if find_spec("ray") is None:
        raise Unsupported("a cluster needs Ray, which is not installed: pip install 'redraft[cluster]'")
    address = address or os.environ.get("RAY_ADDRESS") or None
    with ExitStack() as stack:
        if address is None:
            folder = stack.enter_context(_folder())
            token = folder / "auth_token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            stack.enter_context(_environment({**SURE, LOOPBACK: "0", "RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": str(token)}))
            cpus = max(at_least, len(os.sched_getaffinity(0)))
            options: dict[str, Any] = {"address": "local", "num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": False}
            options["_temp_dir"] = str(folder / "ray")  # a folder inside, because Ray lets every user write to it
            yield _join(stack, options, folder)
        else:
            _check(address)
            stack.enter_context(_environment(SURE))
            yield _join(stack, {"address": address}, None)


def last_line(error: Exception) -> str:
    """What an error of Ray says after the traces of its processes."""
    return shown(Exception(str(error).strip().rpartition("\n")[2]))


def _join(stack: ExitStack, options: Mapping[str, Any], folder: Path | None) -> RayCluster:
    import ray
    from ray._private import auto_init_hook, ray_constants, worker
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    if ray.is_initialized():
        raise InvalidInput("this process is connected to a Ray cluster already")
    local = folder is not None or options["address"].rpartition(":")[0] in LOCAL
    ray_constants.ENABLE_RAY_CLUSTER = not local  # False: 127.0.0.1 is not replaced by an address that other machines reach
    auto_init_hook.enable_auto_connect = False  # else a call after the end starts another cluster
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    stack.enter_context(_ended_by_sigterm())
    stack.callback(setattr, worker, "_worker_logs_enabled", worker._worker_logs_enabled)
    worker._worker_logs_enabled = False  # Ray prints news of its processes to stdout, whatever log_to_driver is
    stack.callback(ray.shutdown, wait_for_processes=True)
    try:
        context = ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        what = "Ray cannot start" if folder else f"the Ray cluster at {options['address']} cannot be used"
        raise Unavailable(f"{what}: {shown(error)}") from None
    _end_by_sigterm()  # ray.init sets a handler of its own
    assert folder is None or context.address_info["node_ip_address"] in LOCAL, "Ray listens on every interface"
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    having = sorted((int(node.get("CPU", 0)) for node in nodes), reverse=True)
    return RayCluster(context.address_info["gcs_address"], folder, tuple(having), sum(int(node.get("GPU", 0)) for node in nodes))


def _check(address: str) -> None:
    """Raises unless the cluster answers with the token that Ray finds here, and not without one."""
    found = re.fullmatch(r"\[?([^\s\[\]/]+)\]?:(\d{1,5})", address)
    if found is None:
        raise InvalidInput(f"ray-address = {shown(address)}: HOST:PORT is needed")
    silent = Unavailable(f"ray-address = {address}: no Ray cluster answers")
    try:
        socket.create_connection((found[1], int(found[2])), ANSWERS).close()
    except (OSError, OverflowError, UnicodeError):
        raise silent from None
    without = _probe(address, "disabled")
    if without == "accepted":
        raise Unsupported(
            f"ray-address = {address}: this cluster executes the code of anybody who reaches it, because it asks for no token; start it "
            "with RAY_AUTH_MODE=token"
        )
    with_token = without and _probe(address, "token")
    if not with_token:
        raise silent
    if with_token == "refused":
        raise InvalidInput(
            f"ray-address = {address}: there is no token, or another cluster's, in RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or "
            "~/.ray/auth_token"
        )


def _probe(address: str, mode: str) -> str:
    """What a cluster answers to a process with this RAY_AUTH_MODE: accepted, refused, or nothing. Ray reads the mode once a process."""
    command = [sys.executable, "-c", PROBE, address, mode]
    try:
        done = subprocess.run(command, env={**os.environ, "RAY_AUTH_MODE": mode}, capture_output=True, text=True, timeout=PROBED)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip()


@contextmanager
def _folder() -> Iterator[Path]:
    """A new folder that only this user can read, removed at the end."""
    path = tempfile.mkdtemp(prefix="redraft-ray-")
    if len(path) > LONGEST_FOLDER:
        os.rmdir(path)
        path = tempfile.mkdtemp(prefix="redraft-ray-", dir="/tmp")
    try:
        yield Path(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Sets variables, or removes them (None), until the end of the block. Ray's processes inherit them."""
    before = {name: value for name, value in os.environ.items() if _of_ray(name)}
    for name, value in values.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    try:
        yield
    finally:
        for name in filter(_of_ray, list(os.environ)):
            del os.environ[name]
        os.environ.update(before)


def _of_ray(name: str) -> bool:
    """Whether a variable is one that Ray sets."""
    return name.startswith("RAY_") or name == "PYTHONBREAKPOINT"


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    _end_by_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_by_sigterm() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
