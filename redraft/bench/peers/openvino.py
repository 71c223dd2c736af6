"""OpenVINO GenAI: not supported yet.

It reads its own format, for which there is no converter here, and GGUF files: the one that llama.cpp reads (see gguf.py, no tokenizer in
it) makes OpenVINO GenAI 2026.4 end with `unordered_map::at`, which keys it misses was not looked into.
"""

from __future__ import annotations

from typing import Any

from redraft.bench.peers.peer import Asked
from redraft.errors import Unsupported


class OpenVino:
    does: tuple[str, ...] = ()
    facts: dict[str, Any]

    def __init__(self, asked: Asked) -> None:
        raise Unsupported("openvino is not supported yet: nothing here converts a checkpoint to what it reads")
