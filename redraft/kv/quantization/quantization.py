"""The seam of codecs: in which form keys and values are stored.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner)`. A codec of single tokens
encodes on write, and every read, in the same step too, uses what was stored. A codec of blocks leaves the newest tokens as
they are: whenever `block` more tokens are committed, a sync point, their pages are encoded, and rows beyond the sync point see codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from redraft.card import Card
from redraft.ops.format import Array
from redraft.ops.format import Codec as Codes


class OpenCodec(Codes, Protocol):
    """An opened codec. name: of its format, with all that changes its arrays; arrays: of a unit; block: tokens, a multiple of
    32, after which full pages are encoded, 0 for a codec of single tokens."""

    name: str
    arrays: Mapping[str, Array]
    block: int


class Codec(Protocol):
    """A registered codec: hyper-parameters only."""

    card: ClassVar[Card]

    def open(self, runner: Any) -> OpenCodec: ...
