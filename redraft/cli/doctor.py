"""`redraft doctor`: what this machine has, which backend serves and why, and what the machine could do at most.

Where the figures come from. The processor's model and flags are the kernel's (/proc/cpuinfo); the best instruction set is what
the native library finds by CPUID, XGETBV and, for AMX, the kernel's leave. Memory is what this process may still use, control groups
counted. The read bandwidth is the fastest of ROUNDS passes of all threads over a buffer of BUFFER bytes on huge pages where
the kernel gives them; each worker has written the part that it reads. The peaks are loops of one instruction over registers, on all
threads, the best of 81 runs of 2 to 4 ms. Everything is measured now: what other processes take is missing in the figures, so the
share of its cores that this process got meanwhile is measured beside them, and told where it is less than BUSY.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from redraft.ops.library import Library

BUFFER = 2 << 30  # bytes: the largest last-level caches hold hundreds of millions
HUGE = 2 << 20
ROUNDS = 12
BUSY = 0.9
WIDTH = 140  # columns where it is no terminal that reads it
MODEL_PARAMETERS, MODEL_BYTES = "1.24B", 2.48e9  # of Llama 3.2 1B in bf16: what a step without a batch must read
FLAGS = "avx2 fma f16c avx_vnni avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 amx_tile amx_bf16 amx_int8"
PROC, SYS = Path("/proc"), Path("/sys")

Facts = dict[str, Any]


def doctor(
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
) -> None:
    """Say what this machine has, which backend serves a model and why, and measure the machine's limits.

    Takes a few seconds. The table goes to stdout, the progress bar to stderr.
    """
    from rich.console import Console

    from redraft.bench import files
    from redraft.ops import library

    if json is not None:
        files.check_writable(json)
    refused = _refused()
    loaded = library.load()
    facts = {**_machine(), "isa_refused": refused, **_software(loaded, library.why_not()), **_measured(loaded, Console(stderr=True))}
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    _show(console, facts)
    if json is not None:
        files.write(json, facts)


def _refused() -> str | None:
    """What is wrong with REDRAFT_ISA. It is then taken from the environment: this command goes on with what the machine has."""
    from redraft.errors import InvalidInput
    from redraft.ops import library

    try:
        library.load()
    except InvalidInput as error:
        del os.environ["REDRAFT_ISA"]
        return str(error)
    return None


def _machine() -> Facts:
    from redraft.bench.report import hardware
    from redraft.models.memory import limits

    found = hardware()
    flags = set(_line(PROC / "cpuinfo", "flags").split())
    return {
        "cpu": found["cpu"],
        "cores": found["cores"],
        "flags": [flag for flag in FLAGS.split() if flag in flags],
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "memory_free_bytes": limits(),
        "huge_pages": _huge_pages(),
        "gpu": found["gpu"],
    }


def _software(loaded: Library | None, why_not: str) -> Facts:
    import torch

    from redraft.ops import library

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    pairs = [(dtype, device) for device in devices for dtype in ("float32", "bfloat16")]
    return {
        "library": None if loaded is None else str(loaded.path),
        "library_why_not": why_not or None,
        "isa": None if loaded is None else loaded.isa,
        "isa_detected": None if loaded is None else loaded.isa_detected,
        "isas_compiled": [] if loaded is None else list(loaded.isas_compiled),
        "threads": None if loaded is None else loaded.threads,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "serves": [dict(zip(("dtype", "device", "backend", "why"), (*pair, *library.serves(*pair)))) for pair in pairs],
    }


def _measured(loaded: Library | None, progress: Console) -> Facts:
    """All null without the library: nothing else here reads as fast as the machine allows."""
    from redraft.bench import report
    from redraft.ops.library import PEAKS

    facts: Facts = {"buffer_bytes": None, "read_bytes_per_second": None, "tokens_per_second_limit": None, "peaks": {}, "cpu_share": None}
    if loaded is None:
        return facts
    with report.bar(progress, ROUNDS + 1 + len(PEAKS)) as tick:
        begun, used = time.perf_counter(), time.process_time()
        for kind in PEAKS:
            facts["peaks"][kind] = {"flops": loaded.peak(kind) or None, "instruction": loaded.peak_instruction(kind) or None}
            tick(f"peak {kind}")
        facts["cpu_share"] = min(1.0, (time.process_time() - used) / (time.perf_counter() - begun) / loaded.threads)
        if size := _buffer_bytes():
            facts["buffer_bytes"] = size
            facts["read_bytes_per_second"] = rate = _bandwidth(loaded, size, tick)
            facts["tokens_per_second_limit"] = rate / MODEL_BYTES
    return facts


def _buffer_bytes() -> int:
    """As much as BUFFER, a half of what is free at most, in whole huge pages; 0 where not even one fits."""
    from redraft.models.memory import limits

    return min(BUFFER, limits() // 2) // HUGE * HUGE


def _bandwidth(loaded: Library, size: int, tick: Callable[[str], None]) -> float:
    with _pages(size) as address:
        loaded.fill(address, size)
        tick("buffer")
        best = 0.0
        for _ in range(ROUNDS):  # a call each: Ctrl-C waits for one at most
            best = max(best, loaded.read_bandwidth(address, size))
            tick("reads")
        return best


@contextmanager
def _pages(size: int) -> Iterator[int]:
    """The address of fresh memory, on huge pages if the kernel has them to give."""
    with mmap.mmap(-1, size) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        first = ctypes.c_char.from_buffer(memory)
        try:
            yield ctypes.addressof(first)
        finally:
            del first  # or the memory could not be given back


def _huge_pages() -> str | None:
    """'always', 'madvise' or 'never': when the kernel gives 2 MiB pages without being set up for it; None: it does not say."""
    try:
        setting = (SYS / "kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return setting.partition("[")[2].partition("]")[0] or None


def _line(file: Path, name: str) -> str:
    """The value of the first 'name : value' line of a file, empty where there is none."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return ""
    return next((value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == name), "")


# ---- the table


def _show(console: Console, facts: Facts) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, Text(value))
    console.print(table)


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    from redraft.models.memory import size

    yield "processor", f"{facts['cpu']}, {facts['cores']} core{'s' * (facts['cores'] > 1)} for this process"
    yield "instructions", " ".join(facts["flags"]) or "none of those that kernels use"
    yield "memory", f"{size(facts['memory_bytes'])}, {size(facts['memory_free_bytes'])} free for this process"
    yield "huge pages", _told_huge_pages(facts["huge_pages"])
    if facts["gpu"]:
        yield "gpu", facts["gpu"]
    yield "", ""
    if facts["isa_refused"]:
        yield "wrong setting", f"{facts['isa_refused']}; every other command stops at that"
    yield "native library", facts["library"] or f"none: {facts['library_why_not']}"
    if facts["library"]:
        yield "instruction set", _told_isa(facts)
        yield "threads", f"{facts['threads']} native, {facts['torch_threads']} of PyTorch"
    else:
        yield "threads", f"{facts['torch_threads']} of PyTorch"
    yield "PyTorch", facts["torch"]
    for one in facts["serves"]:
        yield f"{one['dtype']} on {one['device']}", f"{one['backend']}: {one['why']}"
    yield "", ""
    yield from _told_limits(facts)


def _told_huge_pages(setting: str | None) -> str:
    told = {
        "always": "always: every large buffer gets 2 MiB pages",
        "madvise": "madvise: buffers that ask for 2 MiB pages get them, the native kernels' do",
        "never": "never: the kernel gives 4 KiB pages only, which slows reads down",
    }
    return told.get(setting or "", "the kernel does not say")


def _told_isa(facts: Facts) -> str:
    told = f"{facts['isa']}; compiled: {', '.join(facts['isas_compiled'])}"
    return told if facts["isa"] == facts["isa_detected"] else f"{told}; this machine has {facts['isa_detected']}"


def _told_limits(facts: Facts) -> Iterator[tuple[str, str]]:
    from redraft.models.memory import size

    if not facts["library"]:
        yield "limits", "not measured: that takes the native library"
        return
    if rate := facts["read_bytes_per_second"]:
        less = "" if facts["buffer_bytes"] >= BUFFER else ", all that memory allows: caches may flatter it"
        yield "read bandwidth", f"{rate / 1e9:.1f} GB/s (buffer of {size(facts['buffer_bytes'])}{less})"
    else:
        yield "read bandwidth", "not measured: there is no memory for a buffer"
    for kind, peak in facts["peaks"].items():
        yield f"peak {kind}", _told_peak(peak)
    if facts["cpu_share"] < BUSY:
        yield (
            "busy",
            f"other processes were running: {facts['cpu_share']:.0%} of {facts['threads']} threads' time was left, so all this may be low",
        )
    if limit := facts["tokens_per_second_limit"]:
        why = f"that a model of {MODEL_PARAMETERS} parameters in bf16 ({MODEL_BYTES / 1e9:g} GB) could reach when each token reads them all"
        yield "follows", f"{limit:.1f} tokens/s at most {why}"


def _told_peak(peak: Facts) -> str:
    if not peak["flops"]:
        return "this instruction set has no instruction of its own for it"
    return f"{_rate(peak['flops'])} ({peak['instruction']})"


def _rate(operations: float) -> str:
    return f"{operations / 1e12:.2f} Tops/s" if operations >= 1e12 else f"{operations / 1e9:.0f} Gops/s"
