"""Whole texts by Redraft and by other engines, each without speculation and with its own: same weights, prompts, threads and lengths.

Every engine has its own process, which is stopped while another one runs. All modes of all engines generate from one prompt before the
next, in an order that rotates. A call of an engine's own interface is timed, from the ids of the prompt to the last new id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.text import Text

from redraft.bench import report
from redraft.bench.compare import WARM_UP, CompareOptions, Dialogue, Tick, comparable, has_template, order
from redraft.bench.decode import OWN, Engine, Package, Spread, available, over, start
from redraft.bench.peers.peer import ASSISTANT, LOOKUP, PLAIN, Job
from redraft.bench.peers.process import Lost, Raised
from redraft.bench.prompts import Prompt
from redraft.columns import fold
from redraft.config import EngineConfig
from redraft.engine.policies import CHOICES
from redraft.errors import InvalidInput, PromptTooLong, RedraftError, UnknownMethod, did_you_mean
from redraft.models import loader
from redraft.models.tokenizer import Tokenizer

PEERS: dict[str, tuple[Package, tuple[str, ...]]] = {  # the modes of each peer; llama-cpp-python has no draft models
    "transformers": (
        Package("redraft.bench.peers.transformers:Transformers", "transformers torch", "transformers torch"),
        (PLAIN, LOOKUP, ASSISTANT),
    ),
    "llama.cpp": (Package("redraft.bench.peers.llama_cpp:LlamaCppPython", "llama_cpp", "llama-cpp-python gguf"), (PLAIN, LOOKUP)),
    "openvino": (
        Package("redraft.bench.peers.openvino:OpenVinoGenAi", "openvino_genai", "openvino-genai"),
        (PLAIN, LOOKUP, ASSISTANT),
    ),
}
SHARED = {"temperature", "max_tokens", "seed", "ignore_eos", "stop_token_ids"}  # what every engine does alike


@dataclass(frozen=True)
class Against:
    """peers: names of engines; assistant: folder of their draft model; gguf: what llama.cpp reads in place of the checkpoint; engine:
    options of Redraft."""

    peers: tuple[str, ...]
    assistant: str | None = None
    gguf: Path | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 600.0  # seconds of one text

    def check(self, options: CompareOptions) -> None:
        """Raises InvalidInput (UnknownMethod) before anything is loaded."""
        for name in self.peers:
            if name not in PEERS:
                raise UnknownMethod(f"against = {name!r}: {did_you_mean(name, PEERS)}")
            if self.peers.count(name) > 1:
                raise InvalidInput(f"against = {name!r} is given more than once")
        params = options.params
        if not params.greedy:
            raise InvalidInput(f"temperature = {params.temperature:g}: must be 0 with against, because engines draw differently")
        allowed = SHARED | set(CHOICES)
        if other := sorted(params.model_fields_set - allowed):
            value = getattr(params, other[0])
            raise InvalidInput(f"{other[0]} = {value!r}: cannot be used with against; {', '.join(sorted(allowed))} can")
        if options.batch != 1:
            raise InvalidInput(f"batch = {options.batch}: must be 1 with against, because an engine runs one text at a time")
        if options.bound:
            raise InvalidInput("bound = True: cannot be measured with against")
        if (device := self.engine.get("device", "auto")) not in ("auto", "cpu"):
            raise InvalidInput(f"device = {device!r}: must be cpu with against, where all engines run")
        if self.gguf is not None and ("llama.cpp" not in self.peers or not self.gguf.is_file()):
            raise InvalidInput(f"gguf = {self.gguf}: must be a file for llama.cpp, which must be among the engines of against")
        EngineConfig.of(**self.engine)


@dataclass
class Row:
    """One mode of one engine. runs[round][prompt]: its answers; lost: why it left."""

    engine: Engine
    mode: str
    runs: list[list[Any]] = field(default_factory=list)
    lost: str | None = None
    note: str = ""

    @property
    def speeds(self) -> list[float]:
        """New tokens a second of each round, over all prompts."""
        return [sum(len(one["tokens"]) for one in runs) / sum(one["seconds"] for one in runs) for runs in self.runs]


@dataclass
class Comparison:
    """rows[0] is Redraft without drafts."""

    model: str
    dtype: str
    threads: int
    prompts: list[Prompt]
    left_out: list[str]  # ids of prompts that do not fit the context
    rows: list[Row]
    engines: list[Engine]
    missing: dict[str, str]  # peer -> packages to install
    chats: bool  # some prompts are chats, and there is no template
    stopped: bool = False

    @property
    def base(self) -> Row:
        return self.rows[0]

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.rows if row.lost is None]

    @property
    def best(self) -> Row:
        """Redraft's fastest mode, by the median of its rounds."""
        return max((row for row in self.measured if row.engine is self.base.engine), key=lambda row: median(row.speeds))

    def ratio(self, row: Row) -> Spread:
        """Speed of Redraft's best beside this row's, round by round."""
        found = over(self.best.speeds, row.speeds)
        assert found is not None
        return found

    def equal(self, row: Row) -> int:
        """How many prompts have the text of Redraft without drafts in every round."""
        same = [[a["tokens"] == b["tokens"] for a, b in zip(*both)] for both in zip(row.runs, self.base.runs)]
        return sum(map(all, zip(*same)))


def compare(model: str, options: CompareOptions, against: Against, prompts: Seq[Prompt], tick: Tick = lambda what: None) -> Comparison:
    """Runs everything. Always ends all processes. Ctrl-C keeps what every mode has measured, if there is any."""
    against.check(options)
    folder = Path(loader.resolve(model))
    settings = dict(against.engine)
    threads = settings.pop("threads", None) or available()
    checkpoint = loader.inspect(folder, settings.pop("dtype", "auto"))
    dtype = str(checkpoint.dtype)
    tokenizer, tokens = Tokenizer(folder), options.params.max_tokens or 0
    context = min(checkpoint.spec.context, settings.pop("max_model_len", None) or checkpoint.spec.context)
    ids = [Dialogue(prompt, tokenizer).ids() for prompt in prompts]
    fits = [i for i, one in enumerate(ids) if len(one) + tokens < context]
    if not fits:
        raise PromptTooLong(f"none of the {len(prompts)} prompts fits the context of {context} with {tokens} new tokens")
    longest = max(len(ids[i]) for i in fits)
    ends = () if options.params.ignore_eos else checkpoint.eos_ids
    stop = tuple(sorted({*ends, *options.params.stop_token_ids}))
    job = Job(str(folder), dtype, threads, checkpoint.spec.vocab, longest, tokens, longest, (1,), stop=stop)
    rows, missing = _rows(options, against, settings)
    engines = [engine for engine, _ in groupby(row.engine for row in rows)]
    chosen = [prompts[i] for i in fits]
    chats = not has_template(tokenizer) and any(prompt.prompt is None for prompt in chosen)
    left_out = [prompt.id for i, prompt in enumerate(prompts) if i not in fits]
    found = Comparison(model, dtype, threads, chosen, left_out, rows, engines, missing, chats)
    try:
        for engine in engines:
            tick(f"loading {engine.name}")
            start(engine, job, against.timeout)
        for row in rows:
            tick(f"warming up: {row.engine.name}, {row.mode}")
            _ask(row, ids[fits[0]], min(WARM_UP, tokens))
        if found.base.lost:
            raise RedraftError(f"redraft does not run: {found.base.lost}")
        _measure(found, [ids[i] for i in fits], tokens, options.rounds, tick)
    finally:
        for engine in engines:
            if engine.worker is not None:
                engine.worker.end()
    return found


def ticks(prompts: int, options: CompareOptions, against: Against) -> int:
    """About how often `tick` is called."""
    rows = 1 + len(options.drafts) + sum(len(PEERS[name][1]) for name in against.peers)
    return 1 + len(against.peers) + rows * (1 + options.rounds * prompts)


def _rows(options: CompareOptions, against: Against, settings: Mapping[str, Any]) -> tuple[list[Row], dict[str, str]]:
    """All modes of all engines that are installed, and the packages of the others."""
    policies = {seam: text for seam in CHOICES if (text := getattr(options.params, seam))}
    own = Engine("redraft", OWN, {"generation_config": "none", **settings, "device": "cpu", "policies": policies})
    rows, missing = [Row(own, mode) for mode in (PLAIN, *options.drafts)], {}
    for name in against.peers:
        package, modes = PEERS[name]
        if not package.installed:
            missing[name] = package.pip
            continue
        files = {"assistant": against.assistant and str(loader.resolve(against.assistant)), "gguf": against.gguf and str(against.gguf)}
        engine = Engine(name, package.target, {option: file for option, file in files.items() if file})
        rows += [Row(engine, mode) for mode in modes if mode != ASSISTANT or against.assistant]
    return rows, missing


def _measure(found: Comparison, ids: Seq[list[int]], tokens: int, rounds: int, tick: Tick) -> None:
    rows = found.rows
    for row in rows:
        row.runs = [[] for _ in range(rounds)]
    try:
        for turn in range(rounds):
            for p, prompt in enumerate(ids):
                for r in order(len(rows), turn, p):
                    tick(f"round {turn + 1}/{rounds}: {rows[r].engine.name}, {rows[r].mode}")
                    rows[r].runs[turn].append(_ask(rows[r], prompt, tokens))
    except KeyboardInterrupt:
        if not all(row.runs[0] for row in rows):
            raise
        found.stopped = True
        for row, runs in zip(rows, comparable([row.runs for row in rows], len(ids)), strict=True):
            row.runs = runs
        found.prompts = found.prompts[: len(found.base.runs[0])]
    if found.base.lost:
        raise RedraftError(f"redraft does not run: {found.base.lost}")


def _ask(row: Row, prompt: list[int], tokens: int) -> Any:
    """The answer, None if the row left. An engine whose process has ended loses all its rows."""
    worker = row.engine.worker
    row.lost = row.lost or row.engine.lost
    if row.lost or worker is None:
        return None
    try:
        answer = worker.ask({"do": "generate", "with": {"mode": row.mode, "prompt": prompt, "tokens": tokens}})
    except Raised as error:
        row.lost = str(error)
        return None
    except Lost as error:
        row.lost = row.engine.lost = str(error)
        worker.end()
        row.engine.worker = None
        return None
    row.note = answer.get("note", "")
    return answer


# ---- table


HEAD = ("mode", "tokens/s", "redraft's best", "min-max", "same text")
WIDTHS = (-28, 9, 15, 13, 9)  # widths of columns, negative: aligned left; 80 in total with indent and gaps


def show(console: Console, found: Comparison, options: CompareOptions, against: Against) -> None:
    """Fits 80 columns, unless the name of a method does not fit."""
    machine = report.hardware()
    rounds, prompts = len(found.base.runs), len(found.prompts)
    for text in (
        f"{found.model}, {found.dtype}, temperature 0, {options.params.max_tokens} new tokens, {prompts} prompt{'s' * (prompts > 1)}, "
        f"{rounds} round{'s' * (rounds > 1)}",
        f"{machine['cpu']}, {machine['cores']} cores, {found.threads} thread{'s' * (found.threads > 1)} of each engine",
    ):
        _print(console, text, "bold")
    console.print()
    _print(console, _cells(HEAD), "bold")
    for engine in found.engines:
        mine = [row for row in found.measured if row.engine is engine]
        if mine:
            quant = f", {engine.options['quant']}" if engine.options.get("quant") else ""
            _print(console, f"{engine.name} {engine.facts.get('version', '')}{quant}")
        for row in mine:
            for line in _lines(found, row):
                console.print(line, soft_wrap=True)
    console.print()
    for note in notes(found, options, against):
        _print(console, f"- {note}")


def _print(console: Console, text: str, style: str = "") -> None:
    for line in fold(text, console.width):
        console.print(Text(line, style=style), soft_wrap=True)


def _cells(values: Seq[str]) -> str:
    return "  " + " ".join(f"{value:{'<' if width < 0 else '>'}{abs(width)}}" for value, width in zip(values, WIDTHS, strict=True))


def _lines(found: Comparison, row: Row) -> Iterator[Text]:
    name, ratio = row.mode, found.ratio(row)
    if len(name) > -WIDTHS[0]:
        yield Text(f"  {name}")
        name = ""
    spread = "" if row is found.best else f"{ratio.low:.2f}-{ratio.high:.2f}"
    same = "" if row is found.base else f"{found.equal(row)}/{len(found.prompts)}"
    beside = "1" if row is found.best else f"{ratio.median:.2f}x"
    line = Text(_cells((name, f"{median(row.speeds):.1f}", beside, spread, same)))
    if row is not found.best and (ratio.low > 1 or ratio.high < 1):
        at = line.plain.rindex(beside, 0, len(line) - len(spread) - WIDTHS[-1] - 1)
        line.stylize("green" if ratio.low > 1 else "yellow", at, at + len(beside))
    yield line


def notes(found: Comparison, options: CompareOptions, against: Against) -> Iterator[str]:
    best, base = found.best, found.base
    yield "tokens/s: new tokens over the time of whole texts, prompt included, median of the rounds"
    yield f"redraft's best: the speed of {best.mode} beside this mode's in the same round, median and range; over 1: redraft is faster"
    yield f"same text: prompts with the tokens of redraft, {base.mode}, in every round; kernels round differently, so others are no fault"
    if peers := [row for row in found.measured if row.engine is not base.engine]:
        rival = min(peers, key=lambda row: found.ratio(row).median)
        ratio = found.ratio(rival)
        yield (
            f"redraft, {best.mode}: {ratio.median:.2f}x ({ratio.low:.2f}-{ratio.high:.2f}) the speed of the fastest peer, "
            f"{rival.engine.name}, {rival.mode}"
        )
    for row in found.measured:
        if row.note:
            yield f"{row.mode}: {row.note}"
    yield "redraft's drafters begin every text with nothing learned"
    for name, pip in found.missing.items():
        yield f"{name} is not installed: pip install {pip}"
    for engine in found.engines:
        if engine.lost:
            yield f"{engine.name} left: {engine.lost}"
    for row in found.rows:
        if row.lost and not row.engine.lost:
            yield f"{row.engine.name}, {row.mode} left: {row.lost}"
    if quant := base.engine.options.get("quant"):
        yield f"redraft's weights are {quant}, made from {found.dtype}; an engine that reads the checkpoint has {found.dtype}"
    if against.gguf is not None:
        yield f"llama.cpp reads {against.gguf} in place of the checkpoint, so its weights may differ"
    if against.assistant is not None and "llama.cpp" in against.peers:
        yield "llama.cpp: llama-cpp-python has no draft models, so it has no assistant"
    if any(prompt.turns and len(prompt.turns) > 1 for prompt in found.prompts):
        yield "only the first turn of each prompt is run"
    if found.left_out:
        yield f"left out, longer than the context with the new tokens: {', '.join(found.left_out)}"
    if found.chats:
        yield "this checkpoint has no chat template: chats are read as plain text, each message on its own line"
    if found.stopped:
        yield f"stopped by Ctrl-C: of {options.rounds} rounds {len(base.runs)} of {len(found.prompts)} prompts are shown"


# ---- JSON


def document(found: Comparison, options: CompareOptions, against: Against, source: str) -> dict[str, Any]:
    """The JSON document. `source`: where the prompts are from."""
    return {
        "model": found.model,
        "hardware": report.hardware(),
        "commit": report.commit(),
        "stopped": found.stopped,
        "settings": {
            "prompts": source,
            "ids": [prompt.id for prompt in found.prompts],
            "left_out": found.left_out,
            "rounds": len(found.base.runs),
            "threads": found.threads,
            "dtype": found.dtype,
            "params": options.params.model_dump(exclude_defaults=True),
            "assistant": against.assistant,
            "gguf": against.gguf and str(against.gguf),
            "engine": dict(against.engine),
        },
        "missing": found.missing,
        "engines": [{"name": engine.name, "facts": engine.facts, "lost": engine.lost} for engine in found.engines],
        "baseline": found.base.mode,
        "best": found.best.mode,
        "rows": [_row(found, row) for row in found.rows],
    }


def _row(found: Comparison, row: Row) -> dict[str, Any]:
    speed = None if row.lost else Spread.of(row.speeds)
    return {
        "engine": row.engine.name,
        "mode": row.mode,
        "lost": row.lost,
        "note": row.note or None,
        "tokens_per_second": speed and speed._asdict(),
        "redraft_best_over_it": None if row.lost else found.ratio(row)._asdict(),
        "same_text": None if row.lost else found.equal(row),
        "prompts": len(found.prompts),
        "rounds": row.runs,
    }
