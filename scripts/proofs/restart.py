"""What a folder of prefixes is worth after a restart: seconds to the first token of a long prompt. Each figure is of a process of its own,
in turns: computed without a folder, computed and written to a new one, read from it, and read after the system forgot the files. All
must give the same token.

scripts/prove restart smollm2 [--tokens 4000] [--rounds 3] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = ("computed", "computed and written", "read from disk", "read, files not in memory")


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/prove restart", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.in_process is not None:
        print(json.dumps(_first_token(given, Path(given.in_process) if given.in_process else None)))
        return
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as place:
        for turn in range(given.rounds):
            kept = Path(place) / f"kept-{turn}"
            for case in CASES:
                if case == CASES[3]:
                    _forget(kept)
                found[case].append(_run(given, "" if case == CASES[0] else str(kept)))
            shutil.rmtree(kept)
    assert len({one["token"] for runs in found.values() for one in runs}) == 1, "the tokens differ"
    base = found[CASES[0]]
    print(f"{base[0]['tokens']} tokens, {found[CASES[2]][0]['disk_tokens']} of them on disk, {found[CASES[1]][0]['bytes'] / 1e6:.0f} MB\n")
    print(f"{'first token':26}{'seconds':>22}{'of computed':>20}{'processor s':>12}")
    for case, runs in found.items():
        seconds = sorted(one["seconds"] for one in runs)
        ratios = sorted(one["seconds"] / other["seconds"] for one, other in zip(runs, base, strict=True))
        spread = f"{statistics.median(seconds):.3f} ({seconds[0]:.3f}-{seconds[-1]:.3f})"
        ratio = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"
        print(f"{case:26}{spread:>22}{ratio:>20}{statistics.median(one['processor'] for one in runs):12.2f}")
    dropped = max(one["dropped"] for one in found[CASES[1]])
    print(
        f"\nreading alone {statistics.median(one['disk_seconds'] for one in found[CASES[2]]):.3f} s; pages that were not written: {dropped}"
    )


def _run(given: argparse.Namespace, folder: str) -> dict[str, Any]:
    options = [f"--tokens={given.tokens}", f"--threads={given.threads}", f"--dtype={given.dtype}", f"--in-process={folder}"]
    command = [sys.executable, "-m", "scripts.proofs.restart", given.model, *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _first_token(given: argparse.Namespace, folder: Path | None) -> dict[str, Any]:
    from redraft import LLM

    options = {} if folder is None else {"prefix_cache_dir": folder}
    llm = LLM(given.model, draft="none", dtype=given.dtype, threads=given.threads, max_model_len=given.tokens + 64, **options)
    text = " ".join(f"In room {i} of the house stand {i * 7 % 23} chairs and {i * 5 % 11} tables." for i in range(given.tokens))
    prompt = llm.tokenizer.encode(text[: given.tokens * 8])[: given.tokens]
    llm.generate([[1, 2, 3]], temperature=0, max_tokens=1)  # what is made once is made
    began, used = time.perf_counter(), time.process_time()
    output = llm.generate(prompt, temperature=0, max_tokens=1)[0]
    seconds, processor = time.perf_counter() - began, time.process_time() - used
    disk = llm.runner.disk
    assert disk is None or disk.flush(60)
    return {
        "seconds": seconds, "processor": processor, "token": output.outputs[0].token_ids[0], "tokens": len(prompt),
        "disk_tokens": output.disk_tokens, "disk_seconds": output.disk_seconds, "dropped": 0 if disk is None else disk.dropped,
        "bytes": 0 if disk is None else disk.files.total,
    }  # fmt: skip


def _forget(folder: Path) -> None:
    """The system reads the files from the disk the next time."""
    os.sync()
    for path in folder.rglob("*.page"):
        number = os.open(path, os.O_RDONLY)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


if __name__ == "__main__":
    main()
