"""Ray clusters for tests, each started as its user would, and ended at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def head(token: str | None) -> Iterator[str]:
    """The address of a cluster that asks for the token, or for none."""
    folder = tempfile.mkdtemp(prefix="redraft-tests-", dir="/tmp")  # a short name, for the sockets
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"RAY_AUTH_MODE": "disabled"} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    options = (
        f"--port {port} --num-cpus 2 --object-store-memory 100000000 --include-dashboard false --temp-dir {folder} --disable-usage-stats"
    )
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options.split()]
    environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PYTHONPATH": str(Path(__file__).parents[2]), **own}
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        shown = b""
        while b"Ray runtime started" not in shown:
            line = process.stdout.readline()
            assert line, shown.decode()
            shown += line
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # after SIGTERM Ray may take half a minute
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)
