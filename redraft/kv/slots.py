"""The committed slots of a text: what an eviction policy may read of them, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from redraft.core.tree import F32, I32


class Held(NamedTuple):
    """The committed slots of a text. positions(): those of the slots of each lane, ascending; read(lane): their keys and values
    f32[heads, slots, D], for the kv heads of the lane, keys rotated by their positions; read(lane, first, end): of some slots only."""

    positions: Callable[[], list[I32]]
    read: Callable[..., tuple[F32, F32]]


class Merged(NamedTuple):
    """Kept slots that get new contents: slots[i] of what lane lanes[i] keeps. keys, values: f32[n, D]; tokens: i32[n], the number of tokens
    that each stands for from now on: attention adds its logarithm to the score."""

    lanes: I32
    slots: I32
    keys: F32
    values: F32
    tokens: I32


class Kept(NamedTuple):
    """slots: those that each lane keeps, ascending; merged: new contents of some of them, in PER_HEAD lanes only."""

    slots: list[I32]
    merged: Merged | None = None
