"""Facts about PyTorch, where it is installed. Importing this module does not import it, and neither do the functions, except as they say:
that takes a second."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any


def version() -> str | None:
    """The installed version; None: it is not installed."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def loaded() -> Any:
    """PyTorch, if anything in this process has imported it; else None."""
    return sys.modules.get("torch")


def use_threads(count: int) -> None:
    """Its number of CPU threads, if it is loaded."""
    if (torch := loaded()) is not None:
        torch.set_num_threads(count)


def facts() -> dict[str, Any]:
    """torch (version), torch_threads and torch_isa, which are null if it is not loaded."""
    torch = loaded()
    return {
        "torch": version(),
        "torch_threads": torch and torch.get_num_threads(),
        "torch_isa": torch and torch.backends.cpu.get_cpu_capability(),
    }


def gpu() -> str | None:
    """The name of the GPU that PyTorch may use, None without one. Imports PyTorch, if it is installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
