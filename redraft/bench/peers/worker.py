"""The process of one engine: `python -m redraft.bench.peers.worker`, JSON lines in, JSON lines out.

The first line says which engine and what is Asked; it is answered when the engine is loaded. Then each line names a measurement.
An answer holds "ok", or "error" with what was raised. What libraries print goes to stderr.
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
from redraft.bench.peers.peer import Asked, Peer

_PR_SET_PDEATHSIG = 1


def main() -> None:
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    peer: Peer | None = None
    for line in sys.stdin:
        reported = json.loads(line)
        try:
            if peer is None:
                asked = reported["asked"]
                peer = registry.load(reported["target"])(Asked(**{**asked, "rows": tuple(asked["rows"])}))
                found: Any = {"facts": peer.facts, "does": peer.does}
            else:
                found = _quietly(peer, reported)
            answer = {"ok": found}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _quietly(peer: Peer, reported: dict[str, Any]) -> Any:
    """One measurement without pauses of the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        return getattr(peer, reported["do"])(**reported.get("with", {}))
    finally:
        gc.enable()


def _die_with_parent() -> None:
    """A stopped process would outlive a parent that was killed. Linux only; elsewhere it waits for good."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
