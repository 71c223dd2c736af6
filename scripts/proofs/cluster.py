"""Two hosts: network namespaces of this machine, each with its address and its Ray node. It needs root, and changes nothing outside of its
namespaces.

Batches: `redraft generate --prompts FILE --ray-address` with one engine on each host gives the rows of a run in one process. Meanwhile the
second host loses all its processes; it comes back, and in a second run its network is cut. Then the first run's command is killed and
given again. There is exactly one row for each prompt.

Serving: `redraft serve --ray-address`, with a replica on each host and then with prompts on one and decoding on the other, so that pages go
over the network. Clients stream while the second host ends and comes back. No answer is lost, and no text changes.

A client without the token is refused, and so is a cluster that asks for none.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp

from scripts.proofs.workers import Seen, ask, bodies, client

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ("10.231.77.1", "10.231.77.2")
PORT = 6379
PATIENCE = 300.0  # seconds
QUIET = "--disable-usage-stats --num-cpus 1 --object-store-memory 100000000"


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


class Hosts:
    """This process is on the first one."""

    def __init__(self) -> None:
        self.names = tuple(f"redraft-{os.getpid()}-{host}" for host in "ab")
        self.folder = Path(tempfile.mkdtemp(prefix="redraft-proof-", dir="/tmp"))
        self.token = secrets.token_hex(32)
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Hosts:
        wires = [f"rd{os.getpid()}{host}" for host in "ab"]
        for name in self.names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "link", "add", wires[0], "netns", self.names[0], "type", "veth", "peer", "name", wires[1], "netns", self.names[1])
        for name, wire, address in zip(self.names, wires, HOSTS):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", wire)
            run("ip", "-n", name, "link", "set", wire, "up")
        self.wire = wires[0]
        with open(f"/run/netns/{self.names[0]}", "rb") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")
        return self

    def __exit__(self, *_: object) -> None:
        for host in (1, 0):
            self.end(host)
        for name in self.names:
            run("ip", "netns", "delete", name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def begin(self, host: int) -> None:
        """A Ray node, the head on the first host."""
        where = ["--head", "--port", str(PORT), "--include-dashboard", "false"] if host == 0 else ["--address", f"{HOSTS[0]}:{PORT}"]
        folder = tempfile.mkdtemp(prefix="n", dir=self.folder)
        log = open(f"{folder}.log", "wb")  # noqa: SIM115, as long as the node
        options = f"--block --node-ip-address {HOSTS[host]} --temp-dir {folder} {QUIET}".split()
        self.nodes[host] = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], sys.executable, "-m", "ray.scripts.scripts", "start", *where, *options],
            env=self.environment(),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        until(lambda: b"Ray runtime started" in Path(log.name).read_bytes(), f"the Ray node of host {host}", self.nodes[host])

    def end(self, host: int) -> None:
        """Ends every process of the host at once, but for this one."""
        for pid in map(int, run("ip", "netns", "pids", self.names[host]).split()):
            if pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if node := self.nodes.pop(host, None):
            node.wait()

    def wired(self, on: bool) -> None:
        run("ip", "-n", self.names[0], "link", "set", self.wire, "up" if on else "down")

    def environment(self, **more: str) -> dict[str, str]:
        return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "PYTHONPATH": str(ROOT), **more}


def until(done: Callable[[], bool], what: str, process: subprocess.Popen[bytes]) -> None:
    """Waits for something that a process does."""
    end = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > end or process.poll() is not None:
            raise SystemExit(f"{what}: not within {PATIENCE:.0f} seconds; exit {process.poll()}")
        time.sleep(0.1)


def redraft(*words: str) -> list[str]:
    return [sys.executable, "-m", "redraft", *words]


def report(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# ---- batches


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("part-*")) for line in file.read_text().splitlines()]


def batches(hosts: Hosts, options: argparse.Namespace) -> int:
    """The number of problems."""
    from redraft.bench.prompts import load

    rng, texts = random.Random(options.seed), [prompt.prompt for prompt in load() if prompt.prompt]
    prompts = hosts.folder / "prompts.jsonl"
    with prompts.open("w") as file:
        for i in range(options.rows):
            row = {"prompt": rng.choice(texts)[: rng.randrange(20, 400)], "seed": i, "max_tokens": rng.randrange(8, 96)}
            file.write(json.dumps(row) + "\n")
    common = ("generate", options.model, "--prompts", str(prompts), "--raw", "--threads", "1", "--cache-memory", "256MB")
    subprocess.run(
        redraft(*common, "--output", str(hosts.folder / "alone.jsonl")), check=True, env=hosts.environment(), stderr=subprocess.DEVNULL
    )
    alone = [json.loads(line) for line in (hosts.folder / "alone.jsonl").read_text().splitlines()]
    problems = 0
    cluster = ("--ray-address", f"{HOSTS[0]}:{PORT}", "--replicas", "2")
    for name, harm in (("undisturbed", None), ("host ends", "end"), ("network cut", "cut"), ("command killed", "kill")):
        out = hosts.folder / name.replace(" ", "-")
        command = redraft(*common, "--output", str(out), *cluster)
        began = time.monotonic()
        process = subprocess.Popen(command, env=hosts.environment(), stderr=subprocess.PIPE)
        if harm is not None:
            until(lambda out=out: any(out.glob("part-*")), "the first rows", process)
            match harm:
                case "end":
                    hosts.end(1)
                case "cut":
                    hosts.wired(False)
                case "kill":
                    process.kill()
                    process.communicate()
                    process = subprocess.Popen(command, env=hosts.environment(), stderr=subprocess.PIPE)
        _, shown = process.communicate(timeout=1200)
        found = rows(out)
        wrong = sum(one != other for one, other in zip(found, alone)) + abs(len(found) - len(alone))
        last = shown.decode().splitlines()[-1:]
        report(f"batch, {name}: exit {process.returncode}, {len(found)} rows, {wrong} wrong, {time.monotonic() - began:.0f} s; {last}")
        problems += wrong + (process.returncode != 0)
        if harm in ("end", "cut"):
            hosts.wired(True)
            hosts.end(1)
            hosts.begin(1)
    return problems


# ---- serving


@contextlib.contextmanager
def serving(hosts: Hosts, options: argparse.Namespace, *words: str) -> Iterator[str]:
    with (hosts.folder / "server.log").open("ab") as log:
        settings = ["--port", "8000", "--threads", "1", "--cache-memory", "256MB", "--max-model-len", "1024", "--no-access-log"]
        command = redraft("serve", options.model, *settings, *words)
        process = subprocess.Popen(command, env=hosts.environment(), stdout=log, stderr=log)
        try:
            until(lambda: answers("/health") is not None, "the server", process)
            yield "http://127.0.0.1:8000"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def answers(path: str) -> str | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:8000{path}", timeout=5) as reply:
            return str(reply.read().decode())
    except OSError:
        return None


def metric(name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^redraft:{name}\{{.*\}} (\S+)$", answers("/metrics") or "", re.MULTILINE))


def streams(hosts: Hosts, options: argparse.Namespace) -> int:
    """The number of problems."""
    some, problems = bodies(36, 96, random.Random(options.seed)), 0
    with serving(hosts, options) as url:
        right = asyncio.run(alone(some, url))
    address = ("--ray-address", f"{HOSTS[0]}:{PORT}")
    for words in (("--replicas", "2"), ("--instances", "prefill=1,decode=1")):
        for harm in (False, True):
            seen = Seen()

            async def clients(url: str, harm: bool = harm, seen: Seen = seen) -> None:
                end = time.monotonic() + options.seconds
                tasks = [asyncio.create_task(client(url, some, right, end, random.Random(i), seen)) for i in range(options.streams)]
                if harm:
                    await asyncio.sleep(options.seconds / 4)
                    await asyncio.to_thread(hosts.end, 1)
                    await asyncio.sleep(options.seconds / 4)
                    await asyncio.to_thread(hosts.begin, 1)
                await asyncio.gather(*tasks)

            with serving(hosts, options, *address, *words) as url:
                asyncio.run(clients(url))
                ready, copied = metric("worker_ready"), metric("handover_copied_tokens_total")
            what = f"{' '.join(words)}, {'host ends and comes back' if harm else 'undisturbed'}"
            report(f"serve {what}: {seen.answers} answers, {seen.tokens} tokens, {len(seen.problems)} problems, {copied:.0f} tokens copied")
            for problem in seen.problems[:5]:
                print(f"  {problem}")
            problems += len(seen.problems) + (ready != 2) + (copied == 0 and words[0] == "--instances")
    return problems


async def alone(some: list[dict[str, Any]], url: str) -> list[list[str]]:
    """The texts of one engine, one after the other."""
    async with aiohttp.ClientSession() as session:
        return [(await ask(session, url, body))[0] for body in some]


# ---- the token


def closed(hosts: Hosts) -> int:
    """The number of commands that were not refused."""
    out = hosts.folder / "refused"
    command = redraft("generate", "embedded", "--prompts", str(hosts.folder / "prompts.jsonl"), "--output", str(out), "--ray-address")
    problems = 0
    for name, environment in (("none", {"RAY_AUTH_TOKEN": ""}), ("another", {"RAY_AUTH_TOKEN": "0" * 64})):
        done = subprocess.run([*command, f"{HOSTS[0]}:{PORT}"], env=hosts.environment(**environment), capture_output=True, text=True)
        report(f"token, {name}: exit {done.returncode}, {done.stderr.strip().splitlines()[-1][:120]}")
        problems += done.returncode != 2
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(prog=sys.argv[0], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with Hosts() as hosts:
        hosts.begin(0)
        hosts.begin(1)
        report("two hosts with a Ray node each")
        problems = batches(hosts, options) + closed(hosts) + streams(hosts, options)
    print(f"{problems} problems")
    sys.exit(problems > 0)


if __name__ == "__main__":
    main()
