"""`redraft doctor`: what this machine has, which backend is used and why, the machine's limits, and what of a model runs natively.

Sources of the figures. The processor's model and flags are those of /proc/cpuinfo. The best instruction set is found by the native
library (CPUID, XGETBV and, for AMX, the kernel's permission). Memory is what this process may still use, control groups included. The
read bandwidth is the fastest of ROUNDS passes of all threads over a buffer of BUFFER bytes, on huge pages if the kernel gives them;
each thread reads the part that it has written. The peaks are loops of one instruction over registers, on all threads, the best of 81
runs of 2 to 4 ms. Other processes lower these figures: the share of processor time that this process got is measured too, and shown if
it is below BUSY.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from redraft.models.loader import Checkpoint
    from redraft.ops.library import Library

BUFFER = 2 << 30  # bytes; the largest last-level caches hold hundreds of MiB
HUGE = 2 << 20
ROUNDS = 12
BUSY = 0.9
EXAMPLE = "1.24B parameters in bf16"  # Llama 3.2 1B
EXAMPLE_BYTES = 2.48e9  # that each of its tokens reads
FLAGS = "avx2 fma f16c avx_vnni avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 amx_tile amx_bf16 amx_int8"
PROC, SYS = Path("/proc"), Path("/sys")

Facts = dict[str, Any]


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder, GGUF file, hub id or 'embedded': what of it runs natively.", metavar="MODEL", show_default=False),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of MODEL.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
) -> None:
    """Show what this machine has, which backend is used and why, and measure the machine's limits.

    With MODEL, also which parts of it run in compiled kernels: layers, quantized weights and cache policies.

    Takes some seconds. The table goes to stdout, progress to stderr.
    """
    from rich.console import Console

    from redraft.bench import files
    from redraft.models import loader
    from redraft.ops import library

    if json is not None:
        files.check_writable(json)
    refused = _refused()
    loaded = library.load()
    checkpoint = None if model is None else loader.inspect(loader.resolve(model), dtype)
    progress = Console(stderr=True)
    machine = _machine()
    facts = {**machine, "isa_refused": refused, **_software(loaded, library.why_not(), machine["gpu"])}
    facts["model"] = None if model is None or checkpoint is None else _model(model, checkpoint, progress)
    facts |= _measured(loaded, progress, facts["model"])
    _show(Console(), facts)
    if json is not None:
        files.write(json, facts)


def _model(name: str, checkpoint: Checkpoint, progress: Console) -> Facts:
    from redraft import registry
    from redraft.bench.parts import parts
    from redraft.ops import library
    from redraft.setup import as_stored

    spec, served = checkpoint.spec, library.serves(checkpoint.dtype, "cpu", checkpoint.spec)
    stored = as_stored(checkpoint, registry.backend(served[0]).features) if served[0] == "native" else None
    checkpoint = replace(checkpoint, quant=registry.create("quant", stored)) if stored else checkpoint  # as it runs
    with progress.status("trying layers and policies"):
        found = [part._asdict() for part in parts(checkpoint)]
    return {
        "name": name,
        "family": spec.family,
        "layers": len(spec.layers),
        "dtype": str(checkpoint.dtype),
        "weight_bytes": checkpoint.weight_bytes,
        "bytes_per_token": _bytes_per_token(checkpoint),
        "serves": served,
        "parts": found,
    }


def _bytes_per_token(checkpoint: Checkpoint) -> int:
    """Bytes of weights that a step of one row reads: without embedding tables, and only the chosen experts."""
    from redraft.core.spec import Experts

    spec, total = checkpoint.spec, 0
    for name in spec.shapes():
        expert = re.match(r"layers\.(\d+)\.experts\.(\d+)\.", name)
        mlp = spec.layers[int(expert[1])].mlp if expert else None
        if (
            name == "positions"
            or (name == "embed" and not spec.tied)
            or (expert and isinstance(mlp, Experts) and int(expert[2]) >= mlp.top_k)
        ):
            continue
        total += checkpoint.head_bytes if name == "embed" else checkpoint.bytes_of(name)
    return total


def _refused() -> str | None:
    """What is wrong with REDRAFT_ISA. If so, removes it from the environment, so that this command can continue."""
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


def _software(loaded: Library | None, why_not: str, gpu: str | None) -> Facts:
    from redraft.ops import library, pytorch

    devices = ["cpu", *(["cuda"] if gpu else [])]
    pairs = [(dtype, device) for device in devices for dtype in ("float32", "bfloat16")]
    return {
        "library": None if loaded is None else str(loaded.path),
        "library_why_not": why_not or None,
        "isa": None if loaded is None else loaded.isa,
        "isa_detected": None if loaded is None else loaded.isa_detected,
        "isas_compiled": [] if loaded is None else list(loaded.isas_compiled),
        "threads": None if loaded is None else loaded.threads,
        **{name: pytorch.facts()[name] for name in ("torch", "torch_threads")},
        "serves": [dict(zip(("dtype", "device", "backend", "why"), (*pair, *library.serves(*pair)))) for pair in pairs],
    }


def _measured(loaded: Library | None, progress: Console, model: Facts | None) -> Facts:
    """All null without the library, since only its loops reach the machine's limits."""
    from redraft.bench import report
    from redraft.ops.library import PEAKS

    facts: Facts = {"buffer_bytes": None, "read_bytes_per_second": None, "tokens_per_second_limit": None, "peaks": {}, "cpu_share": None}
    if loaded is None:
        return facts
    with report.bar(progress, ROUNDS + 1 + len(PEAKS)) as tick:
        start, used = time.perf_counter(), time.process_time()
        for kind in PEAKS:
            facts["peaks"][kind] = {"flops": loaded.peak(kind) or None, "instruction": loaded.peak_instruction(kind) or None}
            tick(f"peak {kind}")
        facts["cpu_share"] = min(1.0, (time.process_time() - used) / (time.perf_counter() - start) / loaded.threads)
        if size := _buffer_bytes():
            facts["buffer_bytes"] = size
            facts["read_bytes_per_second"] = rate = _bandwidth(loaded, size, tick)
            facts["tokens_per_second_limit"] = rate / (model["bytes_per_token"] if model else EXAMPLE_BYTES)
    return facts


def _buffer_bytes() -> int:
    """BUFFER, or half of the free memory if that is less, in whole huge pages; 0 if none fits."""
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
    """The address of new memory, on huge pages if the kernel gives them."""
    with mmap.mmap(-1, size) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        first = ctypes.c_char.from_buffer(memory)
        try:
            yield ctypes.addressof(first)
        finally:
            del first  # else the mapping cannot be closed


def _huge_pages() -> str | None:
    """The kernel's setting of transparent huge pages: 'always', 'madvise' or 'never'; None if it does not report one."""
    try:
        setting = (SYS / "kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return setting.partition("[")[2].partition("]")[0] or None


def _line(file: Path, name: str) -> str:
    """The value of the first 'name : value' line of a file, empty if there is none."""
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
    yield "huge pages", _text_of_huge_pages(facts["huge_pages"])
    if facts["gpu"]:
        yield "gpu", facts["gpu"]
    yield "", ""
    if facts["isa_refused"]:
        yield "wrong setting", f"{facts['isa_refused']}; every other command stops at that"
    yield "native library", facts["library"] or f"none: {facts['library_why_not']}"
    if facts["library"]:
        yield "instruction set", _text_of_isa(facts)
    counts = [f"{facts[name]} {of}" for name, of in (("threads", "native"), ("torch_threads", "of PyTorch")) if facts[name]]
    if counts:
        yield "threads", ", ".join(counts)
    if facts["torch"]:
        yield "PyTorch", facts["torch"]
    for one in facts["serves"]:
        yield f"{one['dtype']} on {one['device']}", f"{one['backend']}: {one['why']}"
    if facts["model"]:
        yield "", ""
        yield from _text_of_model(facts["model"])
    yield "", ""
    yield from _text_of_limits(facts)


def _text_of_model(model: Facts) -> Iterator[tuple[str, str]]:
    from redraft.models.memory import size

    yield "model", f"{model['name']}: {model['family']}, {model['layers']} layers, {model['dtype']}, {size(model['weight_bytes'])}"
    yield "used on a CPU", ": ".join(model["serves"])
    native = [part["name"] for part in model["parts"] if part["backend"] == "native"]
    if native:
        yield "native", ", ".join(native)
    for part in model["parts"]:
        if part["backend"] != "native":
            yield part["name"], f"{part['backend']}{': ' * bool(part['why'])}{part['why']}"


def _text_of_huge_pages(setting: str | None) -> str:
    texts = {
        "always": "always: every large buffer gets 2 MiB pages",
        "madvise": "madvise: buffers that request 2 MiB pages get them, as native weights do",
        "never": "never: there are 4 KiB pages only, which slows reads down",
    }
    return texts.get(setting or "", "unknown: the kernel does not report it")


def _text_of_isa(facts: Facts) -> str:
    text = f"{facts['isa']}; compiled: {', '.join(facts['isas_compiled'])}"
    return text if facts["isa"] == facts["isa_detected"] else f"{text}; this machine has {facts['isa_detected']}"


def _text_of_limits(facts: Facts) -> Iterator[tuple[str, str]]:
    from redraft.models.memory import size

    if not facts["library"]:
        yield "limits", "not measured: the native library is needed for that"
        return
    if rate := facts["read_bytes_per_second"]:
        less = "" if facts["buffer_bytes"] >= BUFFER else ", all that memory allows: caches may raise the figure"
        yield "read bandwidth", f"{rate / 1e9:.1f} GB/s (buffer of {size(facts['buffer_bytes'])}{less})"
    else:
        yield "read bandwidth", "not measured: there is no memory for a buffer"
    for kind, peak in facts["peaks"].items():
        yield f"peak {kind}", _text_of_peak(peak)
    if facts["cpu_share"] < BUSY:
        yield (
            "busy",
            f"other processes ran: this one got {facts['cpu_share']:.0%} of {facts['threads']} threads' time, so figures may be low",
        )
    if limit := facts["tokens_per_second_limit"]:
        model = facts["model"]
        what, read = (model["name"], model["bytes_per_token"]) if model else (f"a model of {EXAMPLE}", EXAMPLE_BYTES)
        yield "follows", f"at most {limit:.1f} tokens/s without drafts for {what}, which reads {read / 1e9:.3g} GB for each token"


def _text_of_peak(peak: Facts) -> str:
    if not peak["flops"]:
        return "none: the kernels in use have no such instruction"
    return f"{_rate(peak['flops'])} ({peak['instruction']})"


def _rate(operations: float) -> str:
    return f"{operations / 1e12:.2f} Tops/s" if operations >= 1e12 else f"{operations / 1e9:.0f} Gops/s"
