"""From the records of requests to the figures of a run, with the names and definitions of `vllm bench serve`.

    sent        first chunk with a token         last one
      |---- ttft ----|-- itl --|-- itl --|-- itl --|        e2el = all of it; tpot = (e2el - ttft) / (output tokens - 1)

An inter-token latency is the time between two chunks. If chunks have several tokens, it covers several tokens;
`mean_tokens_per_chunk` says how many. tpot is not affected. The server's `usage` gives the number of output tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from redraft.errors import InvalidInput

METRICS = {"ttft": "time to first token", "tpot": "time per output token", "itl": "inter-token latency", "e2el": "end-to-end latency"}
LIMITED = ("ttft", "tpot", "e2el")  # what goodput can be limited by: one value a request


@dataclass
class Record:
    """The record of one request. Times are seconds from the start of the run. Times of chunks: of chunks with a token.

    due: planned time, None in a closed loop. ended: time of the last chunk about the text. failure: (kind, text); done: it ran to its
    end. counted: the source of the number of output tokens. wanted_input: planned tokens of the prompt. metrics: Redraft's own, if the
    server sends them.
    """

    due: float | None = None
    sent: float | None = None
    chunks: list[float] = field(default_factory=list)
    ended: float = math.nan
    input_tokens: int = 0
    output_tokens: int = 0
    counted: str = ""
    wanted_input: int | None = None
    text: str = ""
    metrics: Mapping[str, Any] | None = None
    done: bool = False
    failure: tuple[str, str] | None = None

    @property
    def begun(self) -> float:
        assert self.sent is not None, "never sent"
        return self.sent

    @property
    def lag(self) -> float | None:
        """How much later than planned it was sent."""
        return None if self.due is None or self.sent is None else self.sent - self.due

    @property
    def ttft(self) -> float:
        return self.chunks[0] - self.begun

    @property
    def e2el(self) -> float:
        return self.ended - self.begun

    @property
    def tpot(self) -> float | None:
        """None for a single token."""
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        return [after - before for before, after in zip(self.chunks, self.chunks[1:])]


@dataclass(frozen=True)
class Run:
    """A whole run. duration: seconds from its start until the last request ended or Ctrl-C."""

    records: list[Record]
    duration: float
    interrupted: bool = False

    @property
    def done(self) -> list[Record]:
        return [record for record in self.records if record.done]


def latencies(done: Iterable[Record]) -> dict[str, list[float]]:
    """The values of each metric in ms. Inter-token latencies are those of all requests together."""
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    for record in done:
        found["ttft"].append(record.ttft * 1000)
        found["e2el"].append(record.e2el * 1000)
        found["itl"] += [gap * 1000 for gap in record.itl]
        if record.tpot is not None:
            found["tpot"].append(record.tpot * 1000)
    return found


def figures(run: Run, limits: Mapping[str, float]) -> dict[str, Any]:
    """The keys of vLLM, then our own. null if there are no values."""
    done, duration = run.done, run.duration
    read, written = sum(record.input_tokens for record in done), sum(record.output_tokens for record in done)
    chunks = sum(len(record.chunks) for record in done)
    good = sum(within(record, limits) for record in done)
    lags = [record.lag * 1000 for record in run.records if record.lag is not None]

    def a_second(count: int) -> float:
        return count / duration if duration else 0.0

    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": sum(record.failure is not None for record in run.records),
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": a_second(len(done)),
        "request_goodput": a_second(good) if limits else None,
        "output_throughput": a_second(written),
        "total_token_throughput": a_second(read + written),
        "max_output_tokens_per_s": float(throughput(done, 1.0).max(initial=0.0)),
        "max_concurrent_requests": int(in_flight(done)[1].max(initial=0)),
    }
    for name, values in latencies(done).items():
        found[f"mean_{name}_ms"] = float(np.mean(values)) if values else None
        found[f"median_{name}_ms"] = float(np.median(values)) if values else None
        found[f"std_{name}_ms"] = float(np.std(values)) if values else None
        found[f"p99_{name}_ms"] = percentile(values, 99)
    wanted = [record for record in done if record.wanted_input is not None]
    found |= {
        "good": good if limits else None,
        "goodput_limits_ms": dict(limits),
        "mean_tokens_per_chunk": written / chunks if chunks else None,
        "max_lag_ms": max(lags, default=None),
        "p99_lag_ms": percentile(lags, 99),
        "interrupted": run.interrupted,
        "unfinished": sum(not record.done and record.failure is None for record in run.records),
        "failures": dict(Counter(record.failure[0] for record in run.records if record.failure is not None).most_common()),
        "output_tokens_from": dict(Counter(record.counted for record in done).most_common()),
        "input_tokens_as_wanted": sum(record.input_tokens == record.wanted_input for record in wanted) if wanted else None,
    }
    if (own := speculation([record.metrics for record in done if record.metrics is not None])) is not None:
        found["redraft"] = own
    return found


def percentile(values: Seq[float], percent: float) -> float | None:
    """The percentile, linear between the two nearest values."""
    return float(np.percentile(values, percent)) if values else None


def within(record: Record, limits: Mapping[str, float]) -> bool:
    """Whether a request kept all limits (ms). A single token has no time per token to exceed."""
    values = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.e2el}
    return all(values[name] * 1000 <= limit for name, limit in limits.items())


def parse_limits(texts: Iterable[str]) -> dict[str, float]:
    """ "ttft:500 tpot:50", also one at a time: milliseconds by metric."""
    found: dict[str, float] = {}
    for part in " ".join(texts).replace(",", " ").split():
        name, _, value = part.partition(":")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if name not in LIMITED or not 0 <= found[name] < math.inf:
            raise InvalidInput(f"goodput = {part!r}: {', '.join(f'{one}:MS' for one in LIMITED)} are what can be limited")
    return found


def speculation(replies: Seq[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Drafting statistics from the server, over all requests that have them."""
    found: dict[str, Any] = {"requests": len(replies)}
    for name in ("steps", "drafted", "accepted"):
        counts = [reply[name] for reply in replies if isinstance(reply.get(name), int)]
        found[name] = sum(counts) if counts else None
    if found["steps"] and found["accepted"] is not None:
        found["mean_acceptance_length"] = 1 + found["accepted"] / found["steps"]
    return found if replies else None


# ---- over time


def throughput(done: Iterable[Record], width: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Output tokens in each `width` seconds from the start; the tokens of a request are shared evenly among its chunks."""
    at, weight = [], []
    for record in done:
        at += record.chunks
        weight += [record.output_tokens / len(record.chunks)] * len(record.chunks)
    if not at:
        return np.zeros(0)
    return np.bincount((np.asarray(at) / width).astype(np.int64), weights=weight).astype(np.float64)


def in_flight(done: Iterable[Record]) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """(times, requests in flight from each time on). A request that ends when another begins does not overlap it."""
    changes = sorted([(record.begun, 1) for record in done] + [(record.ended, -1) for record in done])
    return np.asarray([at for at, _ in changes], np.float64), np.cumsum([change for _, change in changes], dtype=np.int64)
