"""Where Redraft keeps what later processes use: measured times, packed weights, profiles, downloaded models."""

from __future__ import annotations

import os
from pathlib import Path

from redraft.errors import CheckpointError


def folder(name: str) -> Path:
    """The folder of this name in REDRAFT_CACHE, else in $XDG_CACHE_HOME/redraft, else in ~/.cache/redraft. CheckpointError for a user
    without a home."""
    try:
        if own := os.environ.get("REDRAFT_CACHE"):
            return Path(own).expanduser() / name
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "redraft" / name
    except RuntimeError:
        raise CheckpointError("this user has no home folder: REDRAFT_CACHE names another one for what is kept") from None
