"""Single operations of each backend, compared with the machine's limits: linear layers by number of rows, attention over the cache.

Backends take turns within one process, and only the measured backend has more than one thread. Several copies of a weight are used in
turn, so that it is read from memory and not from a CPU cache.

The limit of an operation is the time to read its bytes or to compute its products, whichever is longer. The read bandwidth is measured
beside every measurement, the peak once a round, and ratios are taken within a round, because both change from second to second. Each
layer is a call of its own here, while a step makes one call for all: what a call takes is measured on a small matrix.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from redraft import registry
from redraft.bench import report, shapes
from redraft.bench.decode import Spread, Tick, beside_limits, over
from redraft.bench.peers import limits
from redraft.config import SamplingParams
from redraft.core.batch import Batch
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import UNLIMITED, Request, Sequence
from redraft.core.spec import ModelSpec
from redraft.core.tree import EMPTY, TokenTree
from redraft.errors import InvalidInput
from redraft.kv.store import Store
from redraft.kv.table import PageTable
from redraft.ops import pytorch
from redraft.ops.arrays import DTYPES, Numbers, numpy_dtype
from redraft.ops.backend import Backend, Linear

COLD = 512 << 20  # bytes of all copies of one weight: more than CPU caches hold
COPIES = 1024  # at most, because many copies of a tiny weight take too long
SAMPLE = 0.03  # seconds that one measurement takes at least
PAGE = 32
MOST = 1 << 17  # rows or tokens
SMALL = 32  # inputs and outputs of a matrix that takes no time, to measure a call
CALL = f"a call, {SMALL} to {SMALL}"
ATTENDED = (1, 2, 4, 8, 16, 32, 512)  # rows of one sequence that attention is measured for
TEXTS = 16  # sequences of one row with pages of their own, where `cached` is at most
TEXTS_CACHED = 2048


@dataclass(frozen=True)
class OpsOptions:
    """backends: names, () for all that run on this machine; quants: quantizations in addition to plain weights; cached: tokens that
    attention reads; shared: tokens of a prefix that 8 sequences share, 0 for none; cold: bytes, see COLD."""

    backends: tuple[str, ...] = ()
    quants: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    threads: int = 1
    rows: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 512)
    cached: tuple[int, ...] = (1024, 8192)
    shared: int = 4096
    rounds: int = 5
    cold: int = COLD

    def __post_init__(self) -> None:
        for name in self.backends:
            registry.backend(name)
        if self.dtype not in limits.KINDS:
            raise InvalidInput(f"dtype = {self.dtype!r}: allowed are {', '.join(limits.KINDS)}")
        for name, values, low in (("rows", self.rows, 1), ("cached", self.cached, 1), ("shared", (self.shared,), 0)):
            if any(not low <= value <= MOST for value in values) or not values:
                raise InvalidInput(f"{name} = {','.join(map(str, values))}: numbers from {low} to {MOST} are needed")
        for name, value in (("rounds", self.rounds), ("threads", self.threads)):
            if value < 1:
                raise InvalidInput(f"{name} = {value}: must be 1 or more")
        for text in self.quants:
            registry.create("quant", text)

    @property
    def chosen(self) -> tuple[str, ...]:
        return self.backends or tuple(name for name in registry.BACKENDS if name not in ("numpy", "reference"))


@dataclass
class Line:
    """One operation of one backend and its times, one for each round. bytes: that must be read; flops: operations; kind: number format of
    the multiplication; floor: limits of the machine; count: how often a step makes it; limits: the least seconds, one for each round."""

    operation: str
    backend: str
    size: str  # "1 row", "8192 tokens, 16 rows"
    bytes: float
    flops: float
    kind: str
    floor: dict[str, Any]
    run: Callable[[], object] = field(repr=False)
    mode: Callable[[], AbstractContextManager[Any]] = field(repr=False)  # of the backend, around all calls of `run`
    seconds: list[float] = field(default_factory=list)
    count: int = 1
    limits: list[float] = field(default_factory=list)
    rows: int = 0  # of a linear layer
    empty: Callable[[], object] | None = field(default=None, repr=False)  # attention: the same call over one token; its time is subtracted

    @property
    def took(self) -> Spread:
        found = Spread.of(self.seconds)
        assert found is not None
        return found

    @property
    def times_limit(self) -> Spread:
        """Seconds over the limit of the same round: all bytes read once, or all operations at the peak, whichever takes longer."""
        found = over(self.seconds, self.limits)
        assert found is not None
        return found

    @property
    def of_bandwidth(self) -> float:
        return self.bytes / self.took.median / float(self.floor["bytes_per_second"])

    @property
    def of_peak(self) -> float:
        return self.flops / self.took.median / limits.peak_of(self.floor["flops_per_second"], self.kind)


@dataclass
class Measured:
    model: str
    options: OpsOptions
    lines: list[Line]
    refused: dict[str, str]  # backend -> why it does not run here

    def linear(self, backend: str, operation: str | None = None) -> dict[int, Line]:
        """rows -> a linear layer of `backend`; without `operation` all of a step together, each as often as it occurs."""
        found: dict[int, Line] = {}
        for line in self.lines:
            if line.rows and line.backend == backend and operation in (None, line.operation):
                if line.rows not in found:
                    found[line.rows] = replace(
                        line, bytes=0.0, flops=0.0, seconds=[0.0] * len(line.seconds), limits=[0.0] * len(line.limits)
                    )
                total, count = found[line.rows], line.count if operation is None else 1
                total.bytes += count * line.bytes
                total.flops += count * line.flops
                total.seconds = [a + count * b for a, b in zip(total.seconds, line.seconds, strict=True)]
                total.limits = [a + count * b for a, b in zip(total.limits, line.limits, strict=True)]
        return found

    def calls(self, backend: str) -> dict[int, Spread]:
        """rows -> the share of all linear layers that calls take, which a step does not make."""
        number = sum({line.operation: line.count for line in self.lines if line.rows}.values())
        whole, one = self.linear(backend), self.linear(backend, CALL)
        shares = {rows: over([number * took for took in one[rows].seconds], line.seconds) for rows, line in whole.items()}
        return {rows: share for rows, share in shares.items() if share is not None}


def measure(model: str, options: OpsOptions, tick: Tick = lambda what: None) -> Measured:
    """Measures one operation after another. `tick` is called for each round of an operation."""
    spec, dtype = shapes.spec_of(model), DTYPES[options.dtype]
    limits.use_threads(options.threads)
    backends, refused = _backends(options, dtype)
    found, held = Measured(model, options, [], refused), limits.buffer(options.cold)
    for name, make in _operations(spec, options, backends):
        tick(f"{name}: making weights")
        limits.use_threads(options.threads)
        floor = limits.limits()
        lines = make(floor)
        _take_turns(lines, options, held, lambda turn, name=name: tick(f"{name}: round {turn} of {options.rounds}"))  # type: ignore[misc]
        for line in lines:
            line.run, line.empty = _nothing, None  # frees its weights before those of the next operation are made
        found.lines += lines
    limits.use_threads(options.threads)
    return found


def ticks(options: OpsOptions) -> int:
    """How often `measure` calls `tick`."""
    return (6 + len(options.cached) + bool(options.shared)) * (1 + options.rounds)


def _nothing() -> None:
    pass


def _backends(options: OpsOptions, dtype: np.dtype[Any]) -> tuple[dict[str, Backend], dict[str, str]]:
    from redraft.errors import Unsupported

    found, refused = {}, {}
    for name in options.chosen:
        try:
            found[name] = registry.backend(name)(dtype, "cpu")
        except Unsupported as error:
            refused[name] = str(error)
    if not found:
        raise Unsupported(f"no backend runs here: {'; '.join(refused.values())}")
    return found, refused


Make = Callable[[dict[str, Any]], list[Line]]


def _operations(spec: ModelSpec, options: OpsOptions, backends: dict[str, Backend]) -> Iterator[tuple[str, Make]]:
    every = spec.shapes()
    wanted = {name.split(".")[2]: shape for name, shape in every.items() if name.startswith("layers.0.") and len(shape) == 2}
    for name, (outs, ins) in {**wanted, "head": (spec.vocab, spec.hidden)}.items():
        title = f"{name}, {ins} to {outs}"
        count = 1 if name == "head" else len(spec.layers)
        yield title, partial(_linears, title, outs, ins, count, options, backends)
    yield CALL, partial(_linears, CALL, SMALL, SMALL, 0, replace(options, cold=1), backends)
    for cached in options.cached:
        title = f"attention over {cached} cached tokens"
        yield title, lambda floor, title=title, cached=cached: _attention(title, cached, 1, spec, options, backends, floor)  # type: ignore[misc]
    if options.shared:
        title = f"attention of sequences that share a prefix of {options.shared} tokens"
        yield title, lambda floor: _attention(title, options.shared, 8, spec, options, backends, floor)


# ---- turns


def _take_turns(lines: list[Line], options: OpsOptions, held: Numbers, tick: Callable[[int], None]) -> None:
    """Measures all backends in each round, in an order that rotates. Beside each measurement the buffer `held` is read."""
    for turn in range(options.rounds + 1):
        if turn:
            tick(turn)
        pytorch.use_threads(options.threads)
        peaks = limits.peaks()
        first = turn % len(lines)
        for line in lines[first:] + lines[:first]:
            pytorch.use_threads(1 if line.backend.startswith("native") else options.threads)
            with line.mode():
                took = _sample(line.run) - (_sample(line.empty) if line.empty else 0)
            pytorch.use_threads(options.threads)
            reads = limits.bandwidth(held, 1)
            if turn:  # the first round warms up
                line.seconds.append(took)
                line.limits.append(limits.least_seconds(line.bytes, line.flops, reads, peaks, line.kind))


def _sample(run: Callable[[], object]) -> float:
    count, begun = 0, time.perf_counter()
    while (took := time.perf_counter() - begun) < SAMPLE or not count:
        run()
        count += 1
    return took / count


# ---- operations


def _linears(
    title: str, outs: int, ins: int, count: int, options: OpsOptions, backends: dict[str, Backend], floor: dict[str, Any]
) -> list[Line]:
    lines = []
    dtype, generator = DTYPES[options.dtype], np.random.default_rng(0)
    copies = min(COPIES, max(1, -(-options.cold // (outs * ins * dtype.itemsize))))
    plain = Linear(shapes.normal(generator, (outs, ins), dtype, deviation=ins**-0.5))
    for quant in ("", *options.quants):
        stored: Any = plain
        size = float(outs * ins * dtype.itemsize)
        if quant:
            quantizer, part = registry.create("quant", quant), "head" if title.startswith("head") else "layer"
            stored, size = quantizer.quantize(plain, part, None), float(quantizer.bytes(outs, ins, dtype, part))
        for name, backend in backends.items():
            packed = [backend.pack(_copy(stored)) for _ in range(copies)]
            for rows in options.rows:
                run = _linear(backend, backend.place(shapes.normal(generator, (rows, ins), dtype)), cycle(packed))
                label = f"{name} {quant}".strip()
                kind = "int8" if quant else options.dtype
                named = title, label, f"{rows} row{'s' * (rows > 1)}"
                lines.append(Line(*named, size, 2.0 * rows * outs * ins, kind, floor, run, backend.mode, count=count, rows=rows))
    return sorted(lines, key=lambda line: line.rows)  # lines to compare are next to each other


def _copy(weights: Any) -> Any:
    """A copy with its own memory, so that copies do not share cache lines."""
    if isinstance(weights, Linear):
        return Linear(weights.weight.copy())
    return dataclasses.replace(weights, **{name: array.copy() for name, array in weights.arrays.items()})


def _linear(backend: Backend, x: Any, weights: Iterator[Any]) -> Callable[[], object]:
    return lambda: backend.linear(x, next(weights))


def _attention(
    title: str, cached: int, most_seqs: int, spec: ModelSpec, options: OpsOptions, backends: dict[str, Backend], floor: dict[str, Any]
) -> list[Line]:
    """Uses the layers in turn, so that keys come from memory. With `most_seqs` > 1: 1 and `most_seqs` sequences of one row that share
    their tokens; else one sequence of some rows, and several of one row with tokens of their own. Every layer is a call, where an engine
    makes one call of all layers: the time of the same call over one token is subtracted."""
    shared = most_seqs > 1
    several = [(TEXTS, 1)] if cached <= TEXTS_CACHED else []
    cases = [(1, 1), (most_seqs, 1)] if shared else [*((1, rows) for rows in ATTENDED), *several]
    lines, layer, width = [], spec.attention[0], DTYPES[options.dtype].itemsize

    for count, rows in cases:
        for name, backend in backends.items():
            texts = 1 if shared else count
            size = 2.0 * texts * (cached + rows) * spec.kv_heads * spec.head_dim * width
            flops = 4.0 * count * rows * (cached + (rows + 1) / 2) * layer.heads * spec.head_dim
            case = f"{count} sequence{'s' * (count > 1)}, {rows} row{'s' * (rows > 1)}"
            run, empty = (_attend(backend, spec, some, count, rows, shared) for some in (cached, 1))
            lines.append(Line(title, name, case, size, flops, options.dtype, floor, run, backend.mode, empty=empty))
    return lines


def _attend(backend: Backend, spec: ModelSpec, cached: int, count: int, rows: int, shared: bool) -> Callable[[], object]:
    """One layer of `count` sequences of `cached` tokens, shared or their own. Keys are zeros, because the time does not depend on them."""
    blocks = (-(-cached // PAGE) + 1) * (1 if shared else count) + count * (2 + rows // PAGE)
    table = PageTable(blocks, len(spec.attention), spec.kv_heads)
    store = Store(backend, spec, blocks)
    cached -= cached % PAGE if count > 1 and shared else 0  # whole pages are shared
    works = []
    for i in range(count):
        tokens = [0 if shared else i] * cached + [1 + i]
        seq = Sequence(i, Request(str(i), tokens, SamplingParams(temperature=0)), 0, tokens, len(tokens), 0, sync_point=UNLIMITED)
        table.open(seq)
        table.attach(seq, table.match(tokens, ""))
        if seq.stored < cached:
            work = [Work(seq, cached - seq.stored)]
            store.zero(table.reserve(work, [EMPTY]).fresh)
            store.move(table.commit(work, [Accepted()]))
            table.publish(seq)
        works.append(Work(seq, 1))
    tree = TokenTree.chain([1] * (rows - 1))
    pages = table.reserve(works, [tree] * count)
    store.zero(pages.fresh)
    plan = backend.plan(Batch.pack(works, [tree] * count, pages), spec)
    turn = cycle(range(len(spec.attention)))
    layer, generator = spec.attention[0], np.random.default_rng(0)
    wanted = [(count * rows, heads, spec.head_dim) for heads in (layer.heads, spec.kv_heads, spec.kv_heads)]
    q, k, v = (backend.place(shapes.normal(generator, shape, numpy_dtype(backend.dtype))) for shape in wanted)
    return lambda: backend.attend(i := next(turn), spec.attention[i], q, k, v, store.pool, plan)


# ---- report


def show(console: Console, found: Measured) -> None:
    o, machine = found.options, report.hardware()
    head = (
        f"{found.model}, {o.dtype}: {o.rounds} rounds in turns, {o.threads} thread{'s' * (o.threads > 1)}; medians\n"
        f"{machine['cpu']}, {machine['cores']} cores; limit: to read the bytes or to compute the products, in the same round"
    )
    parts: list[Any] = [Text(head, style="bold")]
    for operation in dict.fromkeys(line.operation for line in found.lines):
        own = [line for line in found.lines if line.operation == operation]
        parts += [Text(), Text(f"{operation}; {_floor(own[0].floor)}")]
        if own[0].rows:
            for backend in dict.fromkeys(line.backend for line in own):
                parts += _by_rows(backend, found.linear(backend, operation))
        else:
            parts.append(_attended(own))
    parts += [Text(), Text("all linear layers of a step, each as often as it occurs; calls: the part that calls take", style="bold")]
    for backend in dict.fromkeys(line.backend for line in found.lines if line.rows):
        parts += _by_rows(backend, found.linear(backend), found.calls(backend))
    parts += [Text(f"- {name} does not run here: {why}") for name, why in found.refused.items()]
    console.print(Group(*parts))


def _floor(floor: dict[str, Any]) -> str:
    peaks = ", ".join(f"{kind} {flops * 1e-12:.2f} TFLOP/s" for kind, flops in floor["flops_per_second"].items())
    return f"limits: {floor['bytes_per_second'] * 1e-9:.1f} GB/s, {peaks}"


def _by_rows(name: str, lines: dict[int, Line], calls: dict[int, Spread] | None = None) -> list[Any]:
    took, least = {rows: line.seconds for rows, line in lines.items()}, {rows: line.limits for rows, line in lines.items()}
    return [Text(name), beside_limits(took, least, {"calls": calls} if calls else None)]


def _attended(lines: Seq[Line]) -> Table:
    """Attention beside its limit, which was measured in the same rounds."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i, column in enumerate(["backend", "", "ms", "limit", "times the limit"]):
        table.add_column(column, justify="left" if i < 2 else "right")
    for line in lines:
        took, least, times = line.took, Spread.of(line.limits), line.times_limit
        assert least is not None
        spread = f"{times.median:.2f} ({times.low:.2f} to {times.high:.2f})"
        table.add_row(line.backend, line.size, f"{took.median * 1e3:.3g}", f"{least.median * 1e3:.3g}", spread)
    return table


def document(found: Measured) -> dict[str, Any]:
    return {
        "model": found.model,
        "hardware": report.hardware(),
        "commit": report.commit(),
        "settings": dataclasses.asdict(found.options),
        "refused": found.refused,
        "lines": [
            {
                "operation": line.operation,
                "backend": line.backend,
                "size": line.size,
                "bytes": line.bytes,
                "flops": line.flops,
                "kind": line.kind,
                "limits": line.floor,
                "seconds": line.took._asdict(),
                "rounds": line.seconds,
                "of_bandwidth": line.of_bandwidth,
                "of_peak": line.of_peak,
                "count": line.count,
                "limit_seconds": line.limits,
                "times_limit": line.times_limit._asdict(),
            }
            for line in found.lines
        ],
        "linear_layers": {
            backend: {rows: _whole(line, found.calls(backend)[rows]) for rows, line in found.linear(backend).items()}
            for backend in dict.fromkeys(line.backend for line in found.lines if line.rows)
        },
    }


def _whole(line: Line, calls: Spread) -> dict[str, Any]:
    measured = {"rounds": line.seconds, "limit_seconds": line.limits}
    return {"seconds": line.took._asdict(), "times_limit": line.times_limit._asdict(), "calls": calls._asdict(), **measured}
