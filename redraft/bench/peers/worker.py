"""The process of one engine: `python -m redraft.bench.peers.worker`, JSON lines in, JSON lines out.

The first line names the engine and its Job. The answer comes when the engine is loaded. Then each line names a measurement. An answer
has "ok", or "error" with the error's text. Output of libraries goes to stderr.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import traceback
from typing import Any

from redraft import registry
from redraft.bench.peers.peer import Job, Peer

_PR_SET_PDEATHSIG = 1


def main() -> None:
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    peer: Peer | None = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if peer is None:
                job = message["job"]
                peer = registry.load(message["target"])(Job(**{**job, "rows": tuple(job["rows"]), "stop": tuple(job["stop"])}))
                found: Any = {"facts": peer.facts, "does": peer.does}
            else:
                found = _measured(peer, message)
            answer = {"ok": found}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _measured(peer: Peer, message: dict[str, Any]) -> Any:
    """One measurement without pauses of the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        return getattr(peer, message["do"])(**message.get("with", {}))
    finally:
        gc.enable()


def _die_with_parent() -> None:
    """Ends this process with its parent, because a stopped process would outlive a killed parent. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
