"""Redraft: an inference engine for large language models whose loop is draft, verify, keep."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redraft.config import EngineConfig as EngineConfig
    from redraft.config import SamplingParams as SamplingParams
    from redraft.errors import RedraftError as RedraftError
    from redraft.inputs import Patch as Patch
    from redraft.llm import LLM as LLM
    from redraft.outputs import CompletionOutput as CompletionOutput
    from redraft.outputs import Delta as Delta
    from redraft.outputs import RequestOutput as RequestOutput

__version__ = "0.1.0"

# Lazy (PEP 562): neither torch nor transformers is imported before an LLM is made.
_HOMES = {
    "CompletionOutput": "redraft.outputs",
    "Delta": "redraft.outputs",
    "EngineConfig": "redraft.config",
    "LLM": "redraft.llm",
    "Patch": "redraft.inputs",
    "RedraftError": "redraft.errors",
    "RequestOutput": "redraft.outputs",
    "SamplingParams": "redraft.config",
}

__all__ = ["LLM", "CompletionOutput", "Delta", "EngineConfig", "Patch", "RedraftError", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'redraft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
