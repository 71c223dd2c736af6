"""How fast engines run one model. They have the same weights and threads, each engine has its own process, and they take turns.

In every round each engine has one turn for each measurement, in an order that rotates from round to round. Waiting engines are stopped
with all their threads (SIGSTOP), so that no thread spins during a measurement. The machine's limits are measured in turns as well, its
read bandwidth before and after every turn that is compared with it. Ratios are taken within a round, because a slower machine then slows
both engines down.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from redraft import registry
from redraft.bench import report, shapes
from redraft.bench.divergence import first_difference
from redraft.bench.peers.limits import least_seconds, peak_of
from redraft.bench.peers.peer import Job
from redraft.bench.peers.process import Lost, Worker
from redraft.config import AUTO, EngineConfig, ModelConfig
from redraft.core.spec import Experts, ModelSpec
from redraft.errors import InvalidInput, RedraftError, UnknownMethod, did_you_mean
from redraft.ops import pytorch
from redraft.ops.arrays import DTYPES

if TYPE_CHECKING:
    from redraft.weights.quant import Quantizer

Tick = Callable[[str], None]

MEASURES = ("decode", "prefill", "steps")
READS = ("decode", "steps")  # measurements with the read bandwidth beside each turn; the peak is measured once a round
LIMITS = "redraft.bench.peers.limits:Limits"


class Package(NamedTuple):
    """target: the peer's class; modules: what it needs, with spaces between them; pip: packages to install; beyond: the part of it that
    `--isa` does not limit."""

    target: str
    modules: str
    pip: str
    beyond: str = ""

    @property
    def installed(self) -> bool:
        return all(importlib.util.find_spec(module) for module in self.modules.split())


PEERS: dict[str, Package] = {
    "transformers": Package("redraft.bench.peers.transformers:Transformers", "transformers torch", "transformers torch"),
    "llama.cpp": Package("redraft.bench.peers.llama_cpp:LlamaCpp", "llama_cpp", "llama-cpp-python gguf", "it"),
    "openvino": Package("redraft.bench.peers.openvino:OpenVino", "openvino", "openvino", "its attention and norms"),
}
OWN = "redraft.bench.peers.redraft:Redraft"

# Settings that limit the instructions of each library. Libraries that ignore them are marked, see Package.beyond.
ISAS: dict[str, dict[str, str]] = {
    "avx2": {
        "REDRAFT_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "REDRAFT_ISA": "avx512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512-bf16": {
        "REDRAFT_ISA": "avx512_bf16",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512_E1",
    },
}


@dataclass(frozen=True)
class DecodeOptions:
    """context, tokens, prefill, rows, repeats: see Job. redraft: options of each redraft engine, which may have one adapter for all its
    texts; against: names of peers."""

    redraft: tuple[Mapping[str, Any], ...] = ({},)
    against: tuple[str, ...] = ("transformers",)
    dtype: str = "auto"
    threads: int = 0
    context: int = 128
    tokens: int = 32
    prefill: int = 512
    rows: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    rounds: int = 5
    repeats: int = 3
    isa: str | None = None
    seed: int = 0
    timeout: float = 600.0
    buffer: int | None = None

    def __post_init__(self) -> None:
        least = {"context": 1, "tokens": 4, "prefill": 1, "rounds": 1, "repeats": 1, "threads": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InvalidInput(f"{name} = {getattr(self, name)}: must be {low} or more")
        if not 0 < self.timeout < math.inf:
            raise InvalidInput(f"timeout = {self.timeout}: seconds, more than 0, are needed")
        if not self.rows or min(self.rows) < 1 or list(self.rows) != sorted(set(self.rows)):
            raise InvalidInput(f"rows = {','.join(map(str, self.rows))}: ascending numbers, 1 or more, are needed")
        for name in self.against:
            if name not in PEERS:
                raise UnknownMethod(f"no engine {name!r} to run against: {did_you_mean(name, PEERS)}")
        if self.isa is not None and self.isa not in ISAS:
            raise InvalidInput(f"isa = {self.isa!r}: {did_you_mean(self.isa, ISAS)}")
        EngineConfig.of(dtype=self.dtype)
        for own in self.redraft:
            try:
                config = EngineConfig.of(**{"dtype": self.dtype, **own})
                config.model.only_adapter()
            except InvalidInput as error:
                raise InvalidInput(f"{_own_name(own)}: {error}") from None
            if config.model.backend != "auto":
                registry.backend(config.model.backend)
            if config.model.quant not in (None, AUTO):
                registry.create("quant", config.model.quant)

    @property
    def workers(self) -> int:
        """Threads of each engine."""
        return self.threads or available()


def available() -> int:
    """The cores that this process may use."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1


def own_engines(common: Mapping[str, Any], several: Seq[str]) -> tuple[Mapping[str, Any], ...]:
    """Options of the redraft engines: one for each "name=value,name=value", in addition to common ones. Without any: the default
    backend, and the torch backend if that is another one and PyTorch is installed."""
    if several:
        return tuple({**common, **_named(text)} for text in several)
    default = ModelConfig.model_fields["backend"].default
    return (dict(common),) if common or default == "torch" or pytorch.version() is None else ({}, {"backend": "torch"})


def _named(text: str) -> dict[str, str]:
    found = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise InvalidInput(f"redraft = {text!r}: {item!r} is not option=value")
        found[name.strip().replace("-", "_")] = value.strip()
    return found


# ---- the run


@dataclass
class Engine:
    """One engine of a run. found: measurement -> its answers, one for each round, None if it did not run; lost: why it left the run;
    beyond: the part of it that uses more instructions than the run's `isa`; reads: measurement -> bytes a second that the machine read
    beside it, the mean of before and after, one for each round."""

    name: str
    target: str
    options: Mapping[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    found: dict[str, list[Any]] = field(default_factory=dict)
    lost: str | None = None
    worker: Worker | None = field(default=None, repr=False)
    differs: dict[str, Any] | None = None
    beyond: str = ""
    reads: dict[str, list[float | None]] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        """The greedy text of its first turn."""
        return next((one["tokens"] for one in self.found.get("decode", []) if one), [])


@dataclass
class Comparison:
    model: str
    folder: Path
    spec: ModelSpec
    options: DecodeOptions
    engines: list[Engine]
    limits: Engine
    missing: dict[str, str]  # peer -> packages to install
    stopped: bool = False  # by Ctrl-C, before the last round

    @property
    def base(self) -> Engine:
        """The first redraft engine. Ratios compare with it."""
        return self.engines[0]


def check(model: str, options: DecodeOptions) -> ModelSpec:
    """The network of the model. InvalidInput if its context is too short for the run; other errors if the model is invalid. Writes
    nothing."""
    spec = shapes.spec_of(model)
    if (longest := _job(spec, Path(), options).longest) > spec.context:
        raise InvalidInput(f"context, tokens, rows or prefill: {longest} positions are needed, but the model's context is {spec.context}")
    return spec


def compare(model: str, options: DecodeOptions, tick: Tick = lambda what: None) -> Comparison:
    """Runs everything. Always ends all processes. Ctrl-C in a round ends the run and keeps its results."""
    spec = check(model, options)
    folder = shapes.checkpoint(model, tick)
    found = Comparison(model, folder, spec, options, *_engines(options))
    job = _job(spec, folder, options)
    everyone = [*found.engines, found.limits]
    try:
        for engine in everyone:
            tick(f"loading {engine.name}")
            start(engine, job, options.timeout, options.isa)
        if all(engine.lost for engine in found.engines):
            raise RedraftError(f"no engine runs: {'; '.join(f'{engine.name}: {engine.lost}' for engine in found.engines)}")
        try:
            for turn in range(options.rounds):
                _measure(found.limits, "peak")
                for measure in MEASURES:
                    before = _read(found.limits) if measure in READS else None
                    for engine in _order(found.engines, turn):
                        tick(f"round {turn + 1}/{options.rounds}, {measure}: {engine.name}")
                        _measure(engine, measure)
                        if measure in READS:
                            after = _read(found.limits)
                            engine.reads.setdefault(measure, []).append(None if before is None or after is None else (before + after) / 2)
                            before = after
        except KeyboardInterrupt:
            if not any(found.base.found.values()):
                raise
            found.stopped = True
        _explain(found, job)
    finally:
        for engine in everyone:
            if engine.worker is not None:
                engine.worker.end()
    return found


def ticks(options: DecodeOptions) -> int:
    """About how often `tick` is called."""
    return (len(options.redraft) + len(options.against)) * (1 + options.rounds * len(MEASURES)) + 1


def _engines(options: DecodeOptions) -> tuple[list[Engine], Engine, dict[str, str]]:
    engines = [Engine(_own_name(own), OWN, own) for own in options.redraft]
    missing = {}
    for name in options.against:
        package = PEERS[name]
        if not package.installed:
            missing[name] = package.pip
        elif options.isa and package.beyond:
            engines.append(Engine(f"{name} (beyond {options.isa})", package.target, {}, beyond=package.beyond))
        else:
            engines.append(Engine(name, package.target, {}))
    size = {} if options.buffer is None else {"bytes": options.buffer, "side": 64}
    return engines, Engine("limits", LIMITS, size), missing


def _own_name(own: Mapping[str, Any]) -> str:
    return " ".join(["redraft", *(f"{name}={','.join(value) if isinstance(value, list) else value}" for name, value in own.items())])


def _adapter(engine: Engine) -> tuple[str, ...]:
    """NAME=FOLDER of its adapter, if it has one."""
    return ModelConfig(lora=engine.options.get("lora", ())).lora


def _job(spec: ModelSpec, folder: Path, o: DecodeOptions) -> Job:
    return Job(str(folder), o.dtype, o.workers, spec.vocab, o.context, o.tokens, o.prefill, o.rows, o.repeats, o.seed)


def start(engine: Engine, job: Job, timeout: float, isa: str | None = None) -> None:
    """Loads an engine in a new process."""
    threads = str(job.threads)
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **(ISAS[isa] if isa else {})}
    try:
        engine.worker = Worker(engine.target, dataclasses.replace(job, options=engine.options), environment, timeout)
        engine.facts = engine.worker.facts
    except Lost as error:
        engine.lost = f"not loaded: {error}"


def _order(engines: list[Engine], turn: int) -> list[Engine]:
    first = turn % len(engines)
    return engines[first:] + engines[:first]


def _measure(engine: Engine, measure: str) -> None:
    """One turn. An engine that fails leaves the run, and its process is ended."""
    found = None
    if engine.worker is not None and measure in engine.worker.does:
        try:
            found = engine.worker.ask({"do": measure})
        except Lost as error:
            engine.lost = f"{measure}: {error}"
            engine.worker.end()
            engine.worker = None
    engine.found.setdefault(measure, []).append(found)


def _read(limits: Engine) -> float | None:
    """Bytes a second that the machine reads now."""
    _measure(limits, "bandwidth")
    found = limits.found["bandwidth"][-1]
    return found and float(found["bytes_per_second"])


def _explain(found: Comparison, job: Job) -> None:
    """The first token where a text differs from the base's, and the difference of the two tokens in the base's logits."""
    for engine in found.engines[1:]:
        mine, its = found.base.tokens, engine.tokens
        if not mine or not its or _adapter(engine) != _adapter(found.base) or (at := first_difference(mine, its)) is None:
            continue
        engine.differs = {"token": at, "expected": mine[at], "found": its[at], "margin": None, "near": None}
        if found.base.worker is not None and not found.stopped:  # after Ctrl-C it may be in the middle of a measurement
            prompt = job.prompt(job.context) + mine[:at]
            try:
                margin = found.base.worker.ask({"do": "margin", "with": {"prompt": prompt, "expected": mine[at], "found": its[at]}})
                engine.differs |= margin
            except Lost as error:
                found.base.lost = f"margin: {error}"


# ---- figures


class Spread(NamedTuple):
    """Over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Seq[float | None]) -> Spread | None:
        known = [value for value in values if value is not None]
        return cls(median(known), min(known), max(known)) if known else None


def seconds(engine: Engine, measure: str, rows: int | None = None) -> list[float | None]:
    """Seconds of a token, of the prompt or of a step of `rows`, one entry for each round."""
    return [None if one is None else _seconds(one, measure, rows) for one in engine.found.get(measure, [])]


def _seconds(one: dict[str, Any], measure: str, rows: int | None) -> float:
    if measure == "steps":
        return float(one["seconds"][str(rows)])
    return median(one["seconds"][2:]) if measure == "decode" else float(one["seconds"])  # the first two steps warm up


def outside(engine: Engine) -> Spread | None:
    """Share of a decode step that is spent outside the kernels, if the engine counts kernel time."""
    return Spread.of(
        [1 - median(one["inside"][2:]) / median(one["seconds"][2:]) for one in engine.found.get("decode", []) if one and "inside" in one]
    )


def over(values: Seq[float | None], by: Seq[float | None]) -> Spread | None:
    """Round by round."""
    return Spread.of([a / b if a is not None and b else None for a, b in zip(values, by)])


def speed_of_base(found: Comparison, engine: Engine, measure: str, rows: int | None = None) -> Spread | None:
    """Speed relative to the base: 0.5 is half as fast."""
    return over(seconds(found.base, measure, rows), seconds(engine, measure, rows))


def share(found: Comparison, engine: Engine, measure: str) -> Spread | None:
    """Share of the read bandwidth for decode, of the number format's peak for prefill."""
    if not engine.facts:
        return None
    work, limit = amount(found, engine, measure), _limit(found, engine, measure)
    return over([work / took if took else None for took in seconds(engine, measure)], limit)


def amount(found: Comparison, engine: Engine, measure: str) -> float:
    """Bytes that one token must read, or operations that the prompt needs."""
    if measure == "decode":
        cached = found.options.context + found.options.tokens / 2
        dtype = str(engine.facts["dtype"])
        return _weight_bytes(found, engine) + cache_bytes(found.spec, cached, DTYPES[dtype].itemsize)
    return linear_flops(found.spec, found.options.prefill)


def _quant(engine: Engine) -> str | None:
    quant = engine.facts.get("quant", engine.options.get("quant"))
    return None if quant in (None, "none") else str(quant)


def _weight_bytes(found: Comparison, engine: Engine) -> float:
    """What a token reads; of weights in the form of their file, all of them."""
    if "stored_bytes" in engine.facts:
        return float(engine.facts["stored_bytes"])
    return read_bytes(found.spec, str(engine.facts["dtype"]), _quant(engine))


def _limit(found: Comparison, engine: Engine, measure: str) -> list[float | None]:
    if measure == "decode":
        return list(engine.reads.get(measure, []))
    kind = _kind(engine)
    return [one and peak_of(one["flops_per_second"], kind) for one in found.limits.found.get("peak", [])]


def _kind(engine: Engine) -> str:
    """The number format of its products."""
    return "int8" if _quant(engine) else str(engine.facts["dtype"])


def least(found: Comparison, engine: Engine, rows: int) -> list[float | None]:
    """The least seconds of a step of `rows` rows, one for each round: to read weights and cache, or to compute the linear layers and the
    head of all rows."""
    dtype, spec = str(engine.facts["dtype"]), found.spec
    size = _weight_bytes(found, engine) + cache_bytes(spec, found.options.context, DTYPES[dtype].itemsize)
    flops = 2 * rows * (_linear_weights(spec) + spec.vocab * spec.hidden)
    pairs = zip(engine.reads.get("steps", []), found.limits.found.get("peak", []))
    return [least_seconds(size, flops, reads, peak["flops_per_second"], _kind(engine)) if reads and peak else None for reads, peak in pairs]


def linears(spec: ModelSpec) -> Iterator[tuple[tuple[int, ...], float]]:
    """The shape of every matrix of the layers, and the part of it that one row uses: in a mixture, the chosen experts."""
    every = spec.shapes()
    for i, layer in enumerate(spec.layers):
        part = layer.mlp.top_k / layer.mlp.count if isinstance(layer.mlp, Experts) else 1.0
        for name, shape in every.items():
            if name.startswith(f"layers.{i}.") and len(shape) > 1:
                yield shape, part if ".experts." in name else 1.0


def read_bytes(spec: ModelSpec, dtype: str, quant: str | None = None) -> float:
    """Bytes of weights that one token must read. Embedding rows, norms and biases are too few to count."""
    kind = DTYPES[dtype]
    if quant is None:
        return _linear_weights(spec) * kind.itemsize + spec.vocab * spec.hidden * kind.itemsize
    quantizer: Quantizer = registry.create("quant", quant)
    layers = sum(part * quantizer.bytes(shape[0], shape[1], kind, "layer") for shape, part in linears(spec))
    return layers + quantizer.bytes(spec.vocab, spec.hidden, kind, "head")


def _linear_weights(spec: ModelSpec) -> float:
    return sum(math.prod(shape) * part for shape, part in linears(spec))


def cache_bytes(spec: ModelSpec, tokens: float, width: float) -> float:
    return 2 * len(spec.attention) * spec.kv_heads * spec.head_dim * tokens * width


def linear_flops(spec: ModelSpec, rows: int) -> float:
    """The head runs on one row."""
    return 2 * (_linear_weights(spec) * rows + spec.vocab * spec.hidden)


# ---- tables


def show(console: Console, found: Comparison) -> None:
    o, machine = found.options, report.hardware()
    head = (
        f"{found.model}: {o.rounds} rounds in turns, {o.workers} threads each{f', {o.isa} only' if o.isa else ''}; "
        f"medians, in brackets minimum and maximum\n{machine['cpu']}, {machine['cores']} cores; limits: {_limits(found)}"
    )
    remarks = Table.grid(padding=(0, 1, 0, 0))
    for note in notes(found):
        remarks.add_row("-", note)
    console.print(Group(Text(head, style="bold"), *(part for title, table in _tables(found) for part in (Text(), Text(title), table))))
    console.print(Group(Text(), remarks))


def _limits(found: Comparison) -> str:
    every = found.limits.found
    reads = Spread.of([one and one["bytes_per_second"] for one in every.get("bandwidth", [])])
    parts = [] if reads is None else [f"reads {_span(reads, 1e-9, '.1f')} GB/s"]
    peaks = [one["flops_per_second"] for one in every.get("peak", []) if one]
    for kind in peaks[0] if peaks else ():
        flops = Spread.of([one[kind] for one in peaks])
        assert flops is not None
        parts.append(f"{kind} {_span(flops, 1e-12, '.2f')} TFLOP/s")
    return (
        ", ".join([*parts, f"measured by {found.limits.facts['how']} ({found.limits.facts['isa']})"])
        if parts
        else f"none, {found.limits.lost}"
    )


def _tables(found: Comparison) -> Iterator[tuple[str, Table]]:
    o = found.options
    columns = "engine", "tokens/s", "speed of base", "GB/s", "of bandwidth"
    yield f"plain decode after {o.context} tokens, {o.tokens} tokens", _rows(found, "decode", columns, 1.0, 1e-9)
    columns = "engine", "tokens/s", "speed of base", "TFLOP/s", "of peak"
    yield f"prefill of {o.prefill} tokens", _rows(found, "prefill", columns, float(o.prefill), 1e-12)
    for engine in found.engines:
        if any(engine.found.get("steps", [])):
            took = {rows: seconds(engine, "steps", rows) for rows in o.rows}
            others = {} if engine is found.base else {"speed of base": {r: speed_of_base(found, engine, "steps", r) for r in o.rows}}
            limits = {rows: least(found, engine, rows) for rows in o.rows}
            yield f"one step after {o.context} tokens: {engine.name}", beside_limits(took, limits, others)


def _rows(found: Comparison, measure: str, columns: Seq[str], tokens: float, unit: float) -> Table:
    table = _table(columns)
    for engine in found.engines:
        took = seconds(engine, measure)
        if any(took):
            rate = Spread.of([tokens / one if one else None for one in took])
            work = Spread.of([amount(found, engine, measure) / one if one else None for one in took])
            assert rate is not None and work is not None
            cells = _span(rate, 1, ".1f"), _ratio(found, engine, measure), f"{work.median * unit:.2f}"
            part = share(found, engine, measure)
            table.add_row(engine.name, *cells, "" if part is None else _span(part, 100, ".0f", " %"))
    return table


def beside_limits(
    took: Mapping[int, Seq[float | None]],
    limits: Mapping[int, Seq[float | None]],
    others: Mapping[str, Mapping[int, Spread | None]] | None = None,
) -> Table:
    """Seconds by rows, and the least possible ones, one for each round. Medians; the ratio to the limit also with its extremes; others:
    further lines. Eleven numbers of rows fit 80 columns."""
    first = next(iter(took))
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("rows", no_wrap=True)
    for rows in took:
        table.add_column(str(rows), justify="right", no_wrap=True, min_width=5)
    found = {rows: over(took[rows], limits[rows]) for rows in took}

    def line(name: str, cells: Mapping[int, float | None], form: str = ".2f") -> None:
        table.add_row(name, *("" if one is None else _short(one, form) for one in cells.values()))

    def middle(values: Mapping[int, Spread | None], unit: float = 1.0) -> dict[int, float | None]:
        return {rows: one and one.median * unit for rows, one in values.items()}

    times = {rows: Spread.of(values) for rows, values in took.items()}
    name, unit = ("us", 1e6) if max((one.median for one in times.values() if one), default=1.0) < 1e-3 else ("ms", 1e3)
    line(name, middle(times, unit), ".3g")
    if any(found.values()):
        line(f"limit, {name}", middle({rows: Spread.of(values) for rows, values in limits.items()}, unit), ".3g")
        line("times limit", middle(found))
        line("  smallest", {rows: one and one.low for rows, one in found.items()})
        line("  largest", {rows: one and one.high for rows, one in found.items()})
    line(f"times {first} row{'s' * (first > 1)}", middle({rows: over(values, took[first]) for rows, values in took.items()}))
    for name, values in (others or {}).items():
        line(name, middle(values))
    return table


def _short(number: float, form: str) -> str:
    """At most five letters for what such tables hold."""
    text = f"{number:.0f}" if number >= 100 else f"{number:{form}}"
    return text if len(text) <= 5 else f"{number:.2g}"


def _ratio(found: Comparison, engine: Engine, measure: str, rows: int | None = None) -> str:
    ratio = speed_of_base(found, engine, measure, rows)
    return "base" if engine is found.base else "" if ratio is None else _span(ratio, 1, ".2f")


def _span(spread: Spread, unit: float, form: str, after: str = "") -> str:
    middle, low, high = (format(value * unit, form) for value in spread)
    return f"{middle}{after} ({low}..{high})"


def _table(columns: Seq[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def notes(found: Comparison) -> Iterator[str]:
    """Notes below the tables: engines that are missing or left, and texts that differ."""
    for name, pip in found.missing.items():
        yield f"{name} is not installed: pip install {pip}"
    for engine in [*found.engines, found.limits]:
        if engine.lost:
            yield f"{engine.name} left: {engine.lost}"
        if engine.beyond:
            yield f"{engine.name}: --isa does not limit {engine.beyond}, which uses every instruction set of this machine"
        if note := engine.facts.get("note"):
            yield f"{engine.name}: {note}"
    for engine in found.engines[1:]:
        if engine.tokens and found.base.tokens:
            yield f"{engine.name}: {_text(engine, found.base)}"
    for engine in found.engines:
        if part := outside(engine):
            yield f"{engine.name}: {_span(part, 100, '.1f', ' %')} of a decode step is spent outside the kernels"


def _text(engine: Engine, base: Engine) -> str:
    differs = engine.differs
    if _adapter(engine) != _adapter(base):
        return f"its text is not compared with that of {base.name}, because their adapters differ"
    if differs is None:
        return f"the same {len(base.tokens)} greedy tokens as {base.name}"
    at = f"greedy text differs from {base.name}'s at token {differs['token'] + 1} of {len(base.tokens)}"
    if differs["margin"] is None:
        return at
    kind = "a near-tie" if abs(differs["margin"]) <= differs["near"] else "NO near-tie"
    return f"{at}: {kind}, {differs['margin']:.3g} apart in the logits of {base.name} (near: up to {differs['near']:.2g})"


# ---- JSON


def document(found: Comparison) -> dict[str, Any]:
    options = dataclasses.asdict(found.options) | {"threads": found.options.workers}
    del options["redraft"], options["buffer"]
    return {
        "model": found.model,
        "folder": str(found.folder),
        "hardware": report.hardware(),
        "commit": report.commit(),
        "settings": options,
        "environment": ISAS[found.options.isa] if found.options.isa else {},
        "stopped": found.stopped,
        "base": found.base.name,
        "per_token_read_bytes": {engine.name: amount(found, engine, "decode") for engine in found.engines if engine.facts},
        "prefill_linear_flops": linear_flops(found.spec, found.options.prefill),
        "missing": found.missing,
        "engines": [_engine(found, engine) for engine in found.engines],
        "limits": {"facts": found.limits.facts, "lost": found.limits.lost, "rounds": found.limits.found},
    }


def _engine(found: Comparison, engine: Engine) -> dict[str, Any]:
    def as_dict(spread: Spread | None) -> dict[str, float] | None:
        return None if spread is None else spread._asdict()

    summary: dict[str, Any] = {}
    for measure in ("decode", "prefill"):
        summary[measure] = {
            "seconds": as_dict(Spread.of(seconds(engine, measure))),
            "speed_of_base": as_dict(speed_of_base(found, engine, measure)),
            "share_of_limit": as_dict(share(found, engine, measure)),
        }
    summary["outside_kernels"] = as_dict(outside(engine))
    summary["steps"] = {
        rows: {
            "seconds": as_dict(Spread.of(seconds(engine, "steps", rows))),
            "of_one_row": as_dict(over(seconds(engine, "steps", rows), seconds(engine, "steps", found.options.rows[0]))),
            "speed_of_base": as_dict(speed_of_base(found, engine, "steps", rows)),
            "limit_seconds": as_dict(Spread.of(least(found, engine, rows))) if engine.facts else None,
            "times_limit": as_dict(over(seconds(engine, "steps", rows), least(found, engine, rows))) if engine.facts else None,
        }
        for rows in found.options.rows
    }
    return {
        "name": engine.name,
        "options": dict(engine.options),
        "beyond_isa": engine.beyond or None,
        "facts": engine.facts,
        "lost": engine.lost,
        "text_differs": engine.differs,
        "summary": summary,
        "bytes_per_second": engine.reads,
        "rounds": engine.found,
    }
