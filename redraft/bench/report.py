"""The results of a comparison as a table and as a JSON document."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from redraft import registry
from redraft.bench.compare import BASELINE, CompareOptions, Comparison, Entry, Mode, Run, Tick, has_template
from redraft.bench.divergence import Divergence, tolerance_label
from redraft.bench.results import CHOOSER, ENOUGH, LOW_REPEAT, Row, Speed
from redraft.card import Guarantee
from redraft.columns import fold
from redraft.engine.budgets import CACHE
from redraft.engine.policies import CHOICES
from redraft.ops import library, pytorch
from redraft.setup import GPUS

DISTRIBUTION = Path(__file__).resolve().parents[1]
EVERY = 5.0  # seconds between two lines of progress without a terminal


def hardware() -> dict[str, Any]:
    """cpu (model name), cores (logical, that this process may use), threads (PyTorch's, null if it is not loaded), kernels and
    native_threads (of the native library, null where there is none), gpu (or null), torch (its version, or null), python."""
    native, torch = library.load(), pytorch.facts()
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch["torch_threads"],
        "kernels": native.isa if native else None,
        "native_threads": native.threads if native else None,
        "gpu": pytorch.gpu() if any(Path(device).exists() for device in GPUS) else None,
        "torch": torch["torch"],
        "python": platform.python_version(),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def busy() -> str:
    """A warning if the load average of other processes is above half the cores; else nothing. This process counts with its own seconds."""
    try:
        others = os.getloadavg()[0] - time.process_time() / 60
    except (AttributeError, OSError):  # another system
        return ""
    cores = os.cpu_count() or 1
    if others <= cores / 2:
        return ""
    return f"this machine is busy, load {others:.1f} by others on {cores} cores: figures may be too slow"


def commit() -> str | None:
    """The commit of this checkout, with "-dirty" if files differ; None outside a checkout."""

    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=DISTRIBUTION, capture_output=True, text=True, timeout=10, check=True)
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else it is another repository, into which this package is installed
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def document(comparison: Comparison, options: CompareOptions, rows: list[Row], source: str) -> dict[str, Any]:
    """The JSON document. `source`: where the prompts are from."""
    llm = comparison.entries[0].llm
    settings = {
        "prompts": source,
        "outputs": comparison.outputs,
        "left_out": comparison.left_out,
        "cut_short": comparison.cut_short,
        "refused": comparison.refused,
        "chat_template": has_template(llm.tokenizer),
        "drafts": list(options.drafts),
        "rounds": comparison.rounds,
        "warm": [prompt.id for prompt in options.warm],
        "batch": options.batch,
        "params": llm.params(options.params).model_dump(exclude_defaults=True),
        "dtype": dtype_name(comparison),
        "device": str(llm.runner.backend.device),
        "tolerance": tolerance_label(llm.runner.backend.dtype),
        "verify": llm.config.verify,
        "schedule": llm.config.schedule.model_dump(),
        "lora": list(llm.config.model.lora),
    }
    return {
        "model": llm.name,
        "hardware": hardware(),
        "commit": commit(),
        "baseline": BASELINE,
        "stopped": comparison.stopped,
        "settings": settings,
        "rows": [_finite(dataclasses.asdict(row)) for row in rows],
    }


def _finite(value: Any) -> Any:
    """The gap; None if it is infinite, because JSON has no infinity."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def bar(console: Console, total: int) -> Iterator[Tick]:
    """A progress bar that disappears at the end. Without a terminal, a line every few seconds. Each tick advances it by one and names
    what ran. Prints "stopped" after Ctrl-C."""
    try:
        with _bar(console, total) if console.is_terminal else _lines(console, total) as tick:
            yield tick
    except KeyboardInterrupt:
        console.print("stopped")
        raise


@contextmanager
def _lines(console: Console, total: int) -> Iterator[Tick]:
    done, printed = 0, time.monotonic()

    def tick(what: str) -> None:
        nonlocal done, printed
        done += 1
        if time.monotonic() - printed >= EVERY:
            printed = time.monotonic()
            console.print(f"{done}/{total} {what}", markup=False, highlight=False, soft_wrap=True)

    yield tick


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Tick]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("loading", total=total)
        yield lambda what: progress.update(task, advance=1, description=what)


def dtype_name(comparison: Comparison) -> str:
    return str(comparison.entries[0].llm.runner.backend.dtype).removeprefix("torch.")


# ---- the table


def show(console: Console, comparison: Comparison, options: CompareOptions, rows: list[Row]) -> None:
    """Fits 80 columns, unless the name of a method does not fit. Each method has its own group of lines."""
    for text in heading(comparison, options):
        _print(console, text, "bold")
    console.print()
    for line in [*_table(rows, HEAD, WIDTHS, _line), *_generation(rows), *_beside(rows)]:
        console.print(line, soft_wrap=True)
    console.print()
    for note in [*legend(options, rows), *notes(comparison, options, rows)]:
        _print(console, f"- {note}")
    for line in _reasons(rows):
        console.print(line, soft_wrap=True)


def _print(console: Console, text: str, style: str = "") -> None:
    for line in fold(text, console.width):
        console.print(Text(line, style=style), soft_wrap=True)


def heading(comparison: Comparison, options: CompareOptions) -> list[str]:
    """What was run, where, and with which policies."""
    llm = comparison.entries[0].llm
    machine, params, backend = hardware(), llm.params(options.params), llm.runner.backend
    rounds, threads = comparison.rounds, backend.threads
    quant = f", weights {llm.config.model.quant}" if llm.config.model.quant else ""
    adapter = f", adapter {params.lora}" if params.lora else ""
    lines = [
        f"{llm.name}, {dtype_name(comparison)}{quant}{adapter}, temperature {params.temperature:g}, {params.max_tokens} new tokens, "
        f"batch {options.batch}, {comparison.outputs} prompts, {rounds} round{'s' * (rounds > 1)}",
        f"{machine['cpu']}, {machine['cores']} cores, {threads} thread{'s' * (threads > 1)}, {backend.name} backend"
        + beside_pytorch(machine),
    ]
    chosen = [f"{seam} {text}" for seam in CHOICES if (text := getattr(params, seam))]
    if llm.cache_policy is not None and not params.model_fields_set & {*CACHE}:
        chosen.append(f"cache policy {llm.config.cache.policy}")
    if chosen:
        weakest = llm.guarantee_with_policy(params).label
        lines.append(f"all under {', '.join(chosen)}, {weakest}; the guarantees below are towards the plain loop under the same")
    return lines


def beside_pytorch(machine: Mapping[str, Any]) -> str:
    """The end of a line about `hardware()`: the version of PyTorch, if it is installed."""
    return f", PyTorch {machine['torch']}" if machine["torch"] else ""


Draw = Callable[[Row], Iterable[Text]]  # the lines of a row


def _table(rows: Iterable[Row], head: Seq[str], widths: Seq[int], draw: Draw) -> Iterator[Text]:
    """All prompts first, then each category. For each method: a line with its name, then one for each state."""
    yield Text(_cells(head, widths), style="bold")
    for category, part in groupby(rows, key=lambda row: row.category):
        if category is not None:
            yield Text()
            yield Text(f"category {category}", style="bold")
        for method, states in groupby(part, key=lambda row: (row.method, row.guarantee)):
            yield Text(", ".join(method))
            for row in states:
                yield from draw(row)


HEAD = ("state", "tokens/s", "speed-up", "min-max", "accept", "equal", "repeat", "peak MiB")
WIDTHS = (-8, 8, 12, 11, 6, 12, 6, 8)  # widths of columns, negative: aligned left; 80 in total with indent and gaps
ALONE = ("state", "tokens/s", "speed-up", "min-max", "at least", "with prompt at least")
ALONE_WIDTHS = (-8, 8, 12, 11, 9, 21)
BESIDE = ("state", "time", "ratio", "min-max", "at least", "fastest other")
BESIDE_WIDTHS = (-8, -11, 6, 11, 9, -28)
NAME = 20  # columns of a category's name
REASONS = ("category", "state", "tokens", "time", "generation", "min-max", "")
REASON_WIDTHS = (-NAME, -8, 7, 6, 11, 11, -9)
VERDICTS = "pays: faster than the plain loop in every round; slower: slower in every round"
COLUMNS = 80


def _cells(values: Iterable[str], widths: Seq[int]) -> str:
    cells = (f"{value:{'<' if width < 0 else '>'}{abs(width)}}" for value, width in zip(values, widths, strict=True))
    return ("  " + " ".join(cells)).rstrip()


def _line(row: Row) -> Iterator[Text]:
    speedup, equal = _speedup(row), _equal(row)
    values = (
        row.mode,
        f"{row.tokens_per_second:.1f}",
        speedup.plain,
        _spread(row),
        f"{row.mean_acceptance_length:.2f}",
        equal.plain,
        f"{row.repeated_8gram_share:.0%}",
        f"{row.peak_kv_bytes / 2**20:.1f}",
    )
    line = Text(_cells(values, WIDTHS))
    _color(line, WIDTHS, {2: speedup, 5: equal})
    yield line


def _color(line: Text, widths: Seq[int], cells: Mapping[int, Text]) -> None:
    for column, cell in cells.items():
        end = 2 + sum(map(abs, widths[: column + 1])) + column
        line.stylize(cell.style, end - len(cell.plain), end)


def _generation(rows: Seq[Row]) -> Iterator[Text]:
    """The table of generation alone; nothing if no text has a second token."""

    def line(row: Row) -> Iterator[Text]:
        if row.generation is not None:
            speed, speedup = row.generation, _speedup(row, row.generation)
            values = row.mode, f"{speed.tokens_per_second:.1f}", speedup.plain, _spread(speed), _least(speed), _least(row)
            drawn = Text(_cells(values, ALONE_WIDTHS))
            _color(drawn, ALONE_WIDTHS, {2: speedup})
            yield drawn

    shown = [row for row in rows if row.generation is not None]
    if shown:
        yield Text()
        yield Text("generation alone, after the first token", style="bold")
        yield from _table(shown, ALONE, ALONE_WIDTHS, line)


def _beside(rows: Seq[Row]) -> Iterator[Text]:
    """The method that chooses beside the fastest of the others; nothing if it was not measured or has no others."""

    def lines(row: Row) -> Iterator[Text]:
        for what, one in row.besides:
            least = "" if one.bound is None else f"{one.bound:.2f}"
            values = row.mode, what, f"{one.ratio:.2f}", f"{one.low:.2f}-{one.high:.2f}", least
            line = _cells([*values, one.method], BESIDE_WIDTHS)
            yield from map(Text, [line] if len(line) <= COLUMNS else [_cells([*values, ""], BESIDE_WIDTHS), f"{one.method:>{COLUMNS}}"])

    if shown := [row for row in rows if row.besides]:
        yield Text()
        yield Text("beside the fastest other method", style="bold")
        yield from _table(shown, BESIDE, BESIDE_WIDTHS, lines)


def _reasons(rows: Seq[Row]) -> Iterator[Text]:
    """Where the method that chooses pays, and why: a line for each category; nothing if there is only one category."""
    chosen = [row for row in rows if row.category is not None and registry.parse(row.method)[0] == CHOOSER]
    shown = [(row, speed) for row in chosen if (speed := row.generation) is not None and speed.speedup is not None]
    if not shown:
        return
    yield Text()
    yield Text("where it pays: tokens a step, over the time of a step in plain ones", style="bold")
    yield Text(_cells(REASONS, REASON_WIDTHS), style="bold")
    for row, speed in shown:
        assert speed.speedup is not None and speed.speedup_low is not None and speed.speedup_high is not None
        verdict = "pays" if speed.speedup_low > 1 else "slower" if speed.speedup_high < 1 else "as plain"
        took = row.mean_acceptance_length / speed.speedup
        figures = f"{row.mean_acceptance_length:.2f}", f"{took:.2f}", f"{speed.speedup:.2f}x", _spread(speed)
        name = row.category or ""
        yield Text(_cells((name if len(name) <= NAME else f"{name[: NAME - 1]}…", row.mode, *figures, verdict), REASON_WIDTHS))
    yield Text(VERDICTS)


def _spread(speed: Row | Speed) -> str:
    return "" if speed.speedup_low is None or speed.speedup_high is None else f"{speed.speedup_low:.2f}-{speed.speedup_high:.2f}"


def _least(speed: Row | Speed) -> str:
    return "" if speed.speedup_bound is None else f"{speed.speedup_bound:.2f}"


def _speedup(row: Row, alone: Speed | None = None) -> Text:
    speed = alone or row
    if row.mode == Mode.BASELINE:
        return Text("1")
    if speed.speedup is None:
        return Text("-", style="red")
    if speed.speedup_high is not None and speed.speedup_high < 1:
        return Text(f"{speed.speedup:.2f}x slower", style="yellow")
    return Text(f"{speed.speedup:.2f}x", style="green" if speed.speedup_low is not None and speed.speedup_low > 1 else "")


def _equal(row: Row) -> Text:
    if row.mode == Mode.BASELINE:
        return Text("")
    if row.tokens_equal:
        return Text("yes", style="green")
    if row.near_ties == row.divergences:
        return Text(f"near {row.near_ties}/{row.outputs}", style="yellow")
    style = "red" if row.withheld is not None else "yellow"  # yellow: its guarantee does not promise the same text
    return Text(f"no {row.divergences - row.near_ties}/{row.outputs}", style=style)


def _drafts(entry: Entry, rounds: list[list[Run]]) -> str:
    """Where the drafts of a method with several drafters came from, and which of these stopped; empty for other methods."""
    runs = [run for one in rounds for run in one]
    steps, kept, stopped = sum(run.steps for run in runs), Counter[str](), Counter[str]()
    for run in runs:
        kept += run.by_drafter
        stopped += run.stopped
    if not steps or (len(kept) < 2 and not stopped):
        return ""
    note = f"{entry.method} {entry.mode}: {sum(run.drafted for run in runs) / steps:.1f} nodes drafted a step"
    if total := kept.total():
        note += ", kept ones from " + ", ".join(f"{name} {count / total:.0%}" for name, count in kept.most_common())
    if stopped:
        named = ", ".join(f"{name} in {count / steps:.0%} of steps" for name, count in stopped.most_common())
        note += f"; stopped where drafts did not pay: {named}"
    return note


def legend(options: CompareOptions, rows: list[Row]) -> list[str]:
    """What the columns are, a line each."""
    lines = [
        "speed-up: median of the rounds' ratios, each over the plain loop of the same round; reading the prompt is timed too; slower: in "
        "every round",
        "accept: tokens a step; equal: texts that are the plain loop's; repeat: tokens in 8-grams that repeat; peak: of the cache",
    ]
    if any(row.generation for row in rows):
        several = options.batch > 1
        since = "after the step that gives the last text of a group its first token" if several else "after the first token"
        lines += [
            f"generation alone: tokens and time {since}, so without the reading of prompts",
            "at least: one-sided 95 % bound of the ratio over all rounds, with generation alone and with the prompt, by bootstrap over the "
            f"{'groups' if several else 'texts'}",
        ]
    return lines


def notes(comparison: Comparison, options: CompareOptions, rows: list[Row]) -> list[str]:
    """Notes below the table, one on each line."""
    llm = comparison.entries[0].llm
    overall = [row for row in rows if row.category is None and row.mode != Mode.BASELINE]
    lines = []
    if comparison.stopped:
        lines.append(f"stopped by Ctrl-C: of {options.rounds} rounds {comparison.rounds} of {comparison.outputs} prompts are shown")
    modes = {row.mode for row in overall}
    if modes & {Mode.COLD, Mode.HOT, Mode.WARM}:
        others = "; hot: learned on the other half of the prompts, never on these" if Mode.HOT in modes else ""
        others += f"; warm: learned on {len(options.warm)} other prompt{'s' * (len(options.warm) > 1)}" if Mode.WARM in modes else ""
        lines.append(f"cold: nothing learned before each prompt group{others}; restored before each, so no round repeats what one learned")
    if any(row.mode == Mode.SAME for row in overall):
        lines.append("cold=hot: a method that learns nothing from other prompts; baseline: the plain loop")
    lines += filter(None, (_drafts(entry, runs) for entry, runs in zip(comparison.entries, comparison.runs, strict=True)))
    for row in overall:
        if row.first_divergence is not None and (row.withheld is not None or promised(row)):
            lines.append(f"{row.method} {row.mode}: {_describe(row, row.first_divergence)}")
        if row.withheld is not None:
            promise = "" if row.fault else f" although it promises {row.guarantee}"
            lines.append(f"{row.method} {row.mode}: no speed-up, {row.withheld}{promise}")
        if row.acceptance_over_bound is not None:
            share = row.acceptance_over_bound
            lines.append(f"{row.method} {row.mode}: {share.ratio:.1%} (+- {share.error:.1%}) of the best possible acceptance")
        if row.fault is not None:
            lines.append(f"{row.method} {row.mode}: {row.fault}")
    if options.bound and not comparison.bounds:
        lines.append("bound: only for verifiers that test sampled drafts, such as --verify recursive, and not greedy")
    if free := sorted({row.guarantee for row in overall if not promised(row)}):
        lines.append(f"{', '.join(free)}: the guarantee does not promise equal texts, so different texts are not a fault")
    if any(row.near_ties for row in overall):
        where, within = dtype_name(comparison), tolerance_label(llm.runner.backend.dtype)
        lines.append(f"near: near-ties; each token is what the plain model ({where}) draws after the same text, or has {within}")
    lines += _low_repeat(overall)
    if comparison.left_out:
        lines.append(f"left out, longer than the context of {llm.max_model_len}: {', '.join(comparison.left_out)}")
    if comparison.cut_short:
        lines.append(f"ended before their last turn, at the context of {llm.max_model_len}: {', '.join(comparison.cut_short)}")
    lines += [f"left out, {one}" for one in comparison.refused]
    chats = any(prompt.prompt is None for group in comparison.groups for prompt in group.prompts)
    if chats and not has_template(llm.tokenizer):
        lines.append("this checkpoint has no chat template: chats are read as plain text, each message on its own line")
    return lines


def promised(row: Row) -> bool:
    """Whether the row's guarantee promises equal texts at some temperature."""
    return Guarantee[row.guarantee.upper().replace("-", "_")] <= Guarantee.SAME_TEXT_GREEDY


def _describe(row: Row, one: Divergence) -> str:
    places = f"prompt {one.prompt}, turn {one.turn + 1}, token {one.position + 1}: {one.found} instead of {one.expected}"
    margin = "no margin" if one.margin is None else f"margin {one.margin:.1e}"
    worst = "" if one.worst is None else f", largest gap in the text {one.worst:.1e}"
    return f"{row.divergences} of {row.outputs} texts differ, {row.near_ties} of them near-ties; first at {places}, {margin}{worst}"


def _low_repeat(overall: list[Row]) -> list[str]:
    """Speed-ups on texts with little repetition. The plain text decides which prompts count, for all methods."""
    row = overall[0]
    what = f"over outputs with an 8-gram share under {LOW_REPEAT}: {row.low_repeat_outputs} of {row.outputs} prompts"
    if row.low_repeat_outputs < ENOUGH:
        return [f"{what}, fewer than {ENOUGH}, so no speed-up is claimed for them"]
    claims = [(row, row.low_repeat_speedup) for row in overall if row.low_repeat_speedup is not None]
    found = [f"{row.method} {row.mode} {ratio:.2f}x" for row, ratio in claims]
    return [f"{what}, speed-up: {', '.join(found)}"] if found else []
