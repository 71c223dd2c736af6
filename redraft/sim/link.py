"""How long pages travel from the worker that computed a prompt to the worker that goes on with it."""

from __future__ import annotations

from dataclasses import dataclass

from redraft.options import Options, number


@dataclass(frozen=True)
class Link(Options):
    """The way into each worker. token_bytes: keys and values of a token; bandwidth: bytes a second; latency: seconds of each hand-over;
    blocking: whether the worker that copies computes nothing meanwhile. Otherwise its other texts go on, and hand-overs follow each
    other."""

    token_bytes: float = number(0.0, ge=0)
    bandwidth: float = number(1e10, gt=0)
    latency: float = number(0.0, ge=0)
    blocking: bool = False

    def seconds(self, tokens: int) -> float:
        """Of a hand-over with so many tokens to copy; nothing if the receiver has all of them."""
        return self.latency + tokens * self.token_bytes / self.bandwidth if tokens else 0.0


FREE = Link()
