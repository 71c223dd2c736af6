"""How a comparison is shown: a table for people, a JSON document for programs."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from redraft.bench.compare import BASELINE, Comparison, Mode, Options, Tick, has_template
from redraft.bench.divergence import Divergence, tolerance_label
from redraft.bench.results import ENOUGH, LOW_REPEAT, Row
from redraft.card import Guarantee
from redraft.engine.policies import SEAMS
from redraft.ops import library

DISTRIBUTION = Path(__file__).resolve().parents[1]
EVERY = 5.0  # seconds between two lines of progress where it is no terminal that reads them


def hardware() -> dict[str, Any]:
    """cpu (model name), cores (logical, that this process may use), threads (PyTorch's), kernels and native_threads (of the native
    library, null where there is none), gpu (or null), torch, python."""
    native = library.load()
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": native.isa if native else None,
        "native_threads": native.threads if native else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
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


def commit() -> str | None:
    """The commit that this code was checked out from, with "-dirty" where files differ; None outside a checkout."""

    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=DISTRIBUTION, capture_output=True, text=True, timeout=10, check=True)
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else another repository that this one is installed in
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def document(comparison: Comparison, options: Options, rows: list[Row], source: str) -> dict[str, Any]:
    """The JSON document; `source`: where the prompts came from."""
    llm = comparison.entries[0].llm
    settings = {
        "prompts": source,
        "outputs": sum(len(group.prompts) for group in comparison.groups),
        "left_out": comparison.left_out,
        "cut_short": comparison.cut_short,
        "refused": comparison.refused,
        "chat_template": has_template(llm.tokenizer),
        "drafts": list(options.drafts),
        "rounds": options.rounds,
        "batch": options.batch,
        "params": llm.params(options.params).model_dump(exclude_defaults=True),
        "dtype": dtype_name(comparison),
        "device": str(llm.runner.backend.device),
        "tolerance": tolerance_label(llm.runner.backend.dtype),
        "verify": llm.config.verify,
        "schedule": llm.config.schedule.model_dump(),
    }
    return {
        "model": llm.name,
        "hardware": hardware(),
        "commit": commit(),
        "baseline": BASELINE,
        "settings": settings,
        "rows": [_finite(dataclasses.asdict(row)) for row in rows],
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity: a gap that no tolerance could excuse is null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def bar(console: Console, total: int) -> Iterator[Tick]:
    """A progress bar that is gone afterwards; no terminal gets a line now and then instead. Each tick moves it by one and says what ran.
    Ctrl-C is told."""
    try:
        with _bar(console, total) if console.is_terminal else _lines(console, total) as tick:
            yield tick
    except KeyboardInterrupt:
        console.print("stopped")
        raise


@contextmanager
def _lines(console: Console, total: int) -> Iterator[Tick]:
    done, told = 0, time.monotonic()

    def tick(what: str) -> None:
        nonlocal done, told
        done += 1
        if time.monotonic() - told >= EVERY:
            told = time.monotonic()
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


def show(console: Console, comparison: Comparison, options: Options, rows: list[Row]) -> None:
    llm = comparison.entries[0].llm
    machine, params = hardware(), llm.params(options.params)
    backend = llm.runner.backend
    threads = backend.threads
    outputs = sum(len(group.prompts) for group in comparison.groups)
    head = (
        f"{llm.name}, {dtype_name(comparison)}, temperature {params.temperature:g}, {params.max_tokens} new tokens, "
        f"batch {options.batch}, {outputs} prompts, {options.rounds} round{'s' * (options.rounds > 1)}\n"
        f"{machine['cpu']}, {machine['cores']} cores, {threads} thread{'s' * (threads > 1)}, {backend.name} backend, "
        f"PyTorch {machine['torch']}"
    )
    if chosen := [f"{seam} {text}" for seam in SEAMS if (text := getattr(params, seam))]:
        weakest = llm.guarantee_of(params).label
        head += f"\nall under {', '.join(chosen)}, {weakest}; the guarantees below are towards the plain loop under the same"
    told = Table.grid(padding=(0, 1, 0, 0))
    for note in notes(comparison, options, rows):
        told.add_row("-", note)
    console.print(Group(Text(head, style="bold"), Text(), _table(rows, 2 if console.width >= 120 else 1), Text(), told))


def _table(rows: list[Row], gap: int) -> Table:
    """All prompts first, then a part for each category; `gap` spaces between columns."""
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("method", overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("guarantee", no_wrap=True)
    for name in ("tokens/s", "speed-up", "min-max", "accept\nlength"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("tokens\nequal", overflow="fold")
    for name in ("8-gram\nrepeats", "peak\ncache"):
        table.add_column(name, justify="right", no_wrap=True)
    for category, part in groupby(rows, key=lambda row: row.category):
        if category is not None:
            table.add_row()
            table.add_row(Text(category, style="bold"))
        for row in part:
            table.add_row(
                row.method,
                row.mode,
                row.guarantee,
                f"{row.tokens_per_second:.1f}",
                _speedup(row),
                "" if row.speedup_low is None or row.speedup_high is None else f"{row.speedup_low:.2f}-{row.speedup_high:.2f}",
                f"{row.mean_acceptance_length:.2f}",
                _equal(row),
                f"{row.repeated_8gram_share:.0%}",
                _bytes(row.peak_kv_bytes),
            )
    return table


def _speedup(row: Row) -> Text:
    if row.mode == Mode.BASELINE:
        return Text("1")
    if row.speedup is None:
        return Text("-", style="red")
    if row.speedup < 1:
        return Text(f"{row.speedup:.2f}x slower", style="yellow")
    return Text(f"{row.speedup:.2f}x", style="green")


def _equal(row: Row) -> Text:
    if row.mode == Mode.BASELINE:
        return Text("")
    if row.tokens_equal:
        return Text("yes", style="green")
    if row.near_ties == row.divergences:
        return Text(f"{row.near_ties} near-tie{'s' if row.near_ties > 1 else ''} of {row.outputs}", style="yellow")
    style = "red" if row.withheld is not None else "yellow"  # yellow: it never promised the same text
    return Text(f"no: {row.divergences - row.near_ties} of {row.outputs}", style=style)


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def notes(comparison: Comparison, options: Options, rows: list[Row]) -> list[str]:
    """What a reader has to know beside the figures, a line each."""
    llm = comparison.entries[0].llm
    overall = [row for row in rows if row.category is None and row.mode != Mode.BASELINE]
    lines = ["speed-up: median of the rounds' ratios, each over the plain loop of the same round; reading the prompt is timed too"]
    if any(row.mode in (Mode.COLD, Mode.HOT) for row in overall):
        lines.append("cold: nothing learned before each prompt group; hot: learned on the other half of the prompts, never on these")
    for row in overall:
        if row.first_divergence is not None and (row.withheld is not None or promised(row)):
            lines.append(f"{row.method} {row.mode}: {_tell(row, row.first_divergence)}")
        if row.withheld is not None:
            promise = "" if row.fault else f" although it promises {row.guarantee}"
            lines.append(f"{row.method} {row.mode}: no speed-up, {row.withheld}{promise}")
        if row.acceptance_over_bound is not None:
            share = row.acceptance_over_bound
            lines.append(f"{row.method} {row.mode}: accepts {share.ratio:.1%} (+- {share.error:.1%}) of what the best possible rule would")
        if row.fault is not None:
            lines.append(f"{row.method} {row.mode}: {row.fault}")
    if options.bound and not comparison.bounds:
        lines.append("bound: only for drawn children that coins decide on, that is with --verify recursive or the like, and not greedy")
    if free := sorted({row.guarantee for row in overall if not promised(row)}):
        lines.append(f"{', '.join(free)}: the guarantee is not one of equal texts, so other texts are no fault")
    if any(row.near_ties for row in overall):
        where, within = dtype_name(comparison), tolerance_label(llm.runner.backend.dtype)
        lines.append(f"near-tie: each token is what the plain model ({where}) draws after the same text, or has {within}")
    lines += _low_repeat(overall)
    if comparison.left_out:
        lines.append(f"left out, longer than the context of {llm.max_model_len}: {', '.join(comparison.left_out)}")
    if comparison.cut_short:
        lines.append(f"ended before their last turn, at the context of {llm.max_model_len}: {', '.join(comparison.cut_short)}")
    lines += [f"left out, {one}" for one in comparison.refused]
    chats = any(prompt.prompt is None for group in comparison.groups for prompt in group.prompts)
    if chats and not has_template(llm.tokenizer):
        lines.append("this checkpoint has no chat template: chats are read as plain text, their messages on lines of their own")
    return lines


def promised(row: Row) -> bool:
    """Whether the row's guarantee is one of equal texts, at some temperature at least."""
    return Guarantee[row.guarantee.upper().replace("-", "_")] <= Guarantee.SAME_TEXT_GREEDY


def _tell(row: Row, one: Divergence) -> str:
    places = f"prompt {one.prompt}, turn {one.turn + 1}, token {one.position + 1}: {one.found} instead of {one.expected}"
    margin = "no margin" if one.margin is None else f"margin {one.margin:.1e}"
    worst = "" if one.worst is None else f", largest gap in the text {one.worst:.1e}"
    return f"{row.divergences} of {row.outputs} texts differ, {row.near_ties} of them near-ties; first at {places}, {margin}{worst}"


def _low_repeat(overall: list[Row]) -> list[str]:
    """Speed-ups where the model does not loop; the plain text decides which prompts these are, so they are the same for all."""
    row = overall[0]
    what = f"over outputs with an 8-gram share under {LOW_REPEAT}: {row.low_repeat_outputs} of {row.outputs} prompts"
    if row.low_repeat_outputs < ENOUGH:
        return [f"{what}, fewer than {ENOUGH}, so no speed-up is claimed for them"]
    claims = [(row, row.low_repeat_speedup) for row in overall if row.low_repeat_speedup is not None]
    told = [f"{row.method} {row.mode} {ratio:.2f}x{' slower' if ratio < 1 else ''}" for row, ratio in claims]
    return [f"{what}, speed-up: {', '.join(told)}"] if told else []
