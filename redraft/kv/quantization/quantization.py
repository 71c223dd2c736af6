"""The interface of quantization methods (codecs): the form in which keys and values are stored.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner)`. A codec of single tokens encodes on
write; every read, also in the same step, uses the stored codes. A codec of whole pages leaves the newest tokens exact: after every
`block` committed tokens, at a sync point, it encodes their pages, and rows after the sync point see codes. With an eviction policy that
acts once it begins after that. A codec whose `block` is UNLIMITED encodes what the eviction policy of the text would drop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from redraft.card import Card
from redraft.ops.format import Array, PageCodec


class OpenCodec(PageCodec, Protocol):
    """An opened codec. name: the name of its format, different for different arrays; arrays: the arrays of a unit (see ops/format.py);
    block: the number of tokens, a multiple of 32, after which full pages are encoded, 0 for a codec of single tokens, UNLIMITED for one
    that encodes what an eviction policy does not keep."""

    name: str
    arrays: Mapping[str, Array]
    block: int


class Codec(Protocol):
    """A registered codec: hyper-parameters only."""

    card: ClassVar[Card]

    def open(self, runner: Any) -> OpenCodec: ...
