"""Same seed, same text on trained models: every drafter, alone, in a batch, in chunks and with preemption.

float64: each text equals that of `none` alone, token by token. Five prompts are also compared with a dense recompute, one forward pass
over the whole text by tests/contracts/plain.py: each token must be the one drawn from the row before it. float32: the first divergence
of each text from `none` alone is printed with its margin (see plain.draw), which must be under 1e-4. A condition fails if it had no
acceptance, no rejection or, in the small pool, no preemption.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SHARED = ROOT.parent / "shared"
MODELS = {
    "babyllama-105-target": SHARED / "models" / "babyllama-105-target",
    "babyllama-361": SHARED / "models" / "babyllama-361",
    "stories260k": SHARED / "models" / "stories260k",
    "pilot-16m": SHARED / "models" / "pilot-16m",
    "embedded": ROOT / "redraft" / "embedded" / "target",
}
STORIES = SHARED / "data" / "corpus" / "tinystories_lower.txt.zst"
SAMPLING: dict[str, dict[str, float]] = {
    "t=0": {"temperature": 0.0},
    "t=0.8": {"temperature": 0.8},
    "t=0.8 p=0.9 r=1.1": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1},
}
DRAFT_MODELS = {
    "babyllama-105-target": str(SHARED / "models" / "babyllama-105-draft"),
    "pilot-16m": str(SHARED / "models" / "pilot-1m"),
    "embedded": "embedded-draft",
}
DRAFTERS = ("token-recycling", "copyspec", "random trees")
BATCH = 8
LEAST_MARGIN = 1e-4
DENSE = 5  # prompts that are also compared with the dense recompute


@dataclass(frozen=True)
class Task:
    """All conditions of one model, dtype and way of sampling: the work of one process."""

    model: str
    dtype: str
    sampling: str
    prompts: int
    new: int
    drafters: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.model} {self.dtype} {self.sampling}"


@dataclass
class Row:
    """One condition: its counts and its failures."""

    task: Task
    drafter: str
    mode: str
    tokens: int
    seconds: float
    accepted: int = 0
    rejected: int = 0
    preempted: int = 0  # requests preempted at least once
    notes: list[str] = field(default_factory=list)  # divergences that are allowed
    faults: list[str] = field(default_factory=list)


def texts(story: bool) -> Iterator[str]:
    """Stories, or files of the standard library, each from a line in its middle."""
    if story:
        import zstandard

        with STORIES.open("rb") as file:
            data = zstandard.ZstdDecompressor().stream_reader(file).read().decode()
        yield from (part.strip() for part in data.split("<|endoftext|>") if len(part) > 200)
        return
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        start = source.find("\n", len(source) // 3) + 1
        if len(source) - start > 1500:
            yield source[start : start + 1500]


def cut_prompts(tokenizer: Any, story: bool, count: int) -> list[list[int]]:
    """`count` prompts of 40 to 150 tokens, evenly spread."""
    found: list[list[int]] = []
    lengths = [40 + 110 * i // max(1, count - 1) for i in range(count)]
    lengths = [lengths[(7 * i) % count] for i in range(count)] if count % 7 else lengths  # long and short ones mixed
    for text in texts(story):
        if len(found) == count:
            break
        ids = tokenizer.encode(text)
        if len(ids) >= 150:
            found.append(ids[: lengths[len(found)]])
    assert len(found) == count, f"only {len(found)} texts are long enough"
    return found


class Bench:
    """One loaded model; a fresh engine, pool and cache for each condition."""

    def __init__(self, task: Task) -> None:
        import torch

        from redraft import LLM, SamplingParams
        from redraft.models import loader
        from redraft.ops.reference import Reference

        torch.set_num_threads(1)
        self.task = task
        # the checkpoint's weights, for the dense recompute and for margins; read now, because a training run may replace the file
        self.weights = loader.read(loader.inspect(MODELS[task.model], "float64"), Reference())
        self.draft_models: dict[Path, Any] = {}
        self.llm = LLM(str(MODELS[task.model]), dtype=task.dtype, threads=1, max_model_len=256, cache_fraction=0.1)
        story = task.model.startswith(("babyllama", "stories"))
        self.prompts = cut_prompts(self.llm.tokenizer, story, task.prompts)
        self.params = SamplingParams(**SAMPLING[task.sampling], max_tokens=task.new, ignore_eos=True)

    def engine(self, drafter: str, blocks: int, chunk: int, batch: int, known: dict[tuple[str, int], list[int]], runner: Any = None) -> Any:
        from redraft import registry
        from redraft.engine.engine import Engine
        from redraft.models.runner import Runner
        from redraft.sample.sampler import Sampler
        from tests.contracts.drafters import RandomTrees

        own = self.llm.runner
        if runner is None:
            source, draft_model = MODELS[self.task.model], DRAFT_MODELS.get(self.task.model)
            runner = Runner(own.spec, own.weights, own.backend, blocks, source=source, draft_model=draft_model)
            runner.draft_models = self.draft_models  # loaded once for all conditions
        sampler = Sampler(own.spec.vocab, self.llm.eos)
        if drafter == "random trees":
            opened: Any = RandomTrees(own.spec.vocab, seed=1, right=0.5, known=known)
        else:
            opened = registry.create("draft", drafter).open(runner, sampler)
        scheduler = registry.create("sched", "sarathi", token_budget=chunk, max_seqs=batch)
        return Engine(runner, scheduler, opened, registry.create("verify", "coupled"), sampler, max_model_len=256, eos=self.llm.eos)

    def run(
        self, drafter: str, mode: str, blocks: int = 80, known: dict[tuple[str, int], list[int]] | None = None
    ) -> tuple[Row, list[list[int]]]:
        chunk, batch = {"alone": (512, 1), "chunks of 32": (32, BATCH)}.get(mode, (512, BATCH))
        engine = self.engine(drafter, blocks, chunk, batch, known or {})
        began = time.process_time()
        found, stats, preempted = drive(engine, self.prompts, self.params, alone=mode == "alone")
        row = Row(self.task, drafter, mode, sum(map(len, found)), time.process_time() - began)
        row.accepted = sum(s.accepted for s in stats)
        row.rejected = sum(s.drafted - s.accepted for s in stats)
        row.preempted = len(preempted)
        for table in (engine.memory.paged.table, *(model.memory.paged.table for model in self.draft_models.values())):
            table.check()
            if table.used():
                row.faults.append(f"{table.used()} blocks are still held")
        row.faults += sorted({s.fault for s in stats if s.fault})
        if drafter != "none" and not (row.accepted and row.rejected):
            row.faults.append("saw no acceptance or no rejection")
        if mode.startswith("pool") and not preempted:
            row.faults.append("saw no preemption")
        return row, found

    def small_pool(self) -> int:
        """The number of blocks with which about a fifth of the requests is preempted. It is found by running the engine with a model
        that computes nothing."""
        wanted, found = len(self.prompts) / 5, {}
        longest = -(-(max(map(len, self.prompts)) + self.task.new) // 32) + 1
        low, high = longest, BATCH * longest
        while low <= high:  # fewer blocks, more preemptions; not quite monotonous, so the nearest result is used
            middle = (low + high) // 2
            engine = self.engine("none", middle, 512, BATCH, {}, runner=Blank(self.llm.runner, middle))
            found[middle] = len(drive(engine, self.prompts, self.params.but(temperature=0.0, repetition_penalty=1.0, top_p=1.0))[2])
            low, high = (middle + 1, high) if found[middle] > wanted else (low, middle - 1)
        return min(found, key=lambda blocks: (abs(found[blocks] - wanted), blocks))

    def dense(self, found: Seq[list[int]]) -> list[str]:
        """The places where the texts differ from the dense recompute."""
        faults = []
        for i, (prompt, text) in enumerate(zip(self.prompts[:DENSE], found, strict=False)):
            rows = self.dense_logits([*prompt, *text])
            for at, token in enumerate(text):
                drawn, margin = self.draw(rows[len(prompt) + at - 1], i, [*prompt, *text[:at]])
                if drawn != token:
                    faults.append(f"prompt {i} token {at}: {token}, the dense recompute draws {drawn} (margin {margin:.1e})")
                    break
        return faults

    def dense_logits(self, tokens: list[int]) -> Any:
        import torch

        from tests.contracts import plain

        with torch.inference_mode():
            return plain.logits(self.llm.runner.spec, self.weights, tokens)

    def draw(self, row: Any, index: int, tokens: list[int]) -> tuple[int, float]:
        from tests.contracts import plain

        return plain.draw(row, self.params, seed(index), tokens)

    def compare(self, row: Row, truth: Seq[list[int]], found: Seq[list[int]]) -> None:
        for i, (own, other) in enumerate(zip(truth, found, strict=True)):
            if own == other:
                continue
            at = next((k for k, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), min(len(own), len(other)))
            what = f"{row.task} | {row.drafter}, {row.mode}: prompt {i} token {at}"
            tokens = [*self.prompts[i], *own[:at]]
            _, margin = self.draw(self.dense_logits(tokens)[-1], i, tokens)
            what += f", {own[at : at + 1]} and {other[at : at + 1]}, margin {margin:.2e}"
            if row.task.dtype == "float64" or margin >= LEAST_MARGIN:
                row.faults.append(what)
            else:
                row.notes.append(what)


class Blank:
    """A runner with a page table, but without tensors and a model: every argmax is token 3."""

    def __init__(self, like: Any, blocks: int) -> None:
        from redraft.kv.edits import EditableTable
        from redraft.kv.paged import Paged

        self.spec, self.backend = like.spec, like.backend
        self.memory = Paged(like.backend, like.spec, 1)
        self.memory.blocks, self.memory.table = blocks, EditableTable(blocks, len(like.spec.attention), like.spec.kv_heads)
        self.memory.store = self  # type: ignore[assignment]
        self.table = self.memory.table

    def zero(self, fresh: Any) -> None:
        pass

    def move(self, moves: Any) -> None:
        pass

    def forward(self, batch: Any, taps: Any) -> Any:
        import numpy as np

        from redraft.ops.backend import ForwardResult

        return ForwardResult(np.full(len(batch.logit_rows), 3, np.int32))


def seed(index: int) -> int:
    return 1000 + index


def drive(engine: Any, prompts: Seq[list[int]], params: Any, *, alone: bool = False) -> tuple[list[list[int]], list[Any], set[str]]:
    """Texts, statistics and the preempted requests. `alone`: one request after the other."""
    from redraft.core.sequence import Request
    from redraft.engine.output import checked

    found: list[list[int]] = [[] for _ in prompts]
    stats: list[Any] = [None] * len(prompts)
    preempted: set[str] = set()
    enact = engine.enact

    def watched(plan: Any) -> Any:
        preempted.update(seq.request.id for seq in plan.preempt)
        return enact(plan)

    engine.enact = watched
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), list(prompt), params.but(seed=seed(i))))
        while engine.has_work and (alone or i == len(prompts) - 1):
            for event in checked(engine.step()):
                found[int(event.request.id)] += event.tokens
                stats[int(event.request.id)] = event.stats
    return found, stats, preempted


def work(task: Task) -> list[Row]:
    bench = Bench(task)
    base, truth = bench.run("none", "alone")
    rows = [base]
    if task.dtype == "float64":
        base.faults += bench.dense(truth)
    blocks = bench.small_pool()
    known = {(str(i), 0): text for i, text in enumerate(truth)}
    for drafter in task.drafters:
        for mode in ("alone", f"batch of {BATCH}", "chunks of 32", f"pool of {blocks}"):
            row, found = bench.run(drafter, mode, blocks if mode.startswith("pool") else 80, known)
            bench.compare(row, truth, found)
            rows.append(row)
    return rows


def tasks(options: argparse.Namespace) -> tuple[list[Task], list[str]]:
    """The tasks, longest first, and the requested models that are absent."""
    there = [name for name in options.models if (MODELS[name] / "model.safetensors").exists()]
    made = [
        Task(name, dtype, sampling, options.prompts, options.new, tuple(options.drafts))
        for name in sorted(there, key=lambda name: -(MODELS[name] / "model.safetensors").stat().st_size)
        for dtype in options.dtype
        for sampling in SAMPLING
    ]
    return made, [name for name in options.models if name not in there]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--dtype", nargs="+", choices=["float64", "float32"], default=["float64", "float32"])
    parser.add_argument("--drafts", nargs="+", default=list(DRAFTERS), help="registered drafters as on the command line, or 'random trees'")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new", type=int, default=100, help="tokens of each text")
    parser.add_argument("--quick", action="store_true", help="8 prompts of 40 new tokens")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes, one thread each")
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.new = 8, 40
    began = time.perf_counter()
    todo, absent = tasks(options)
    for name in absent:
        print(f"SKIPPED {name}: not at {MODELS[name]}")
    if any(task.model.startswith(("babyllama", "stories")) for task in todo) and importlib.util.find_spec("zstandard") is None:
        parser.error("the stories of babyllama and stories260k need zstandard: pip install 'zstandard>=0.22', or choose other --models")
    rows: list[Row] = []
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for done, found in enumerate(pool.imap_unordered(work, todo), 1):
            rows += found
            bad = sum(bool(row.faults) for row in found)
            spent = time.perf_counter() - began
            print(f"[{done}/{len(todo)}, {spent:.0f} s] {found[0].task}: {len(found)} conditions, {bad} failed", flush=True)
            for row in found:
                for note in row.notes:
                    print(f"    near tie, allowed: {note}", flush=True)
                for fault in row.faults:
                    print(f"    FAILED {row.drafter}, {row.mode}: {fault}", flush=True)
    report(rows)
    failed = sum(bool(row.faults) for row in rows)
    ties = sum(len(row.notes) for row in rows)
    print(f"\n{len(rows)} conditions, {failed} failed, {ties} near ties in float32, {len(absent)} models absent")
    print(f"wall time {(time.perf_counter() - began) / 60:.1f} minutes with {options.jobs} processes of one thread")
    return 1 if failed or not rows else 0


def report(rows: list[Row]) -> None:
    head = ("model", "dtype", "sampling", "drafter", "mode", "tokens", "accepted", "rejected", "preempted", "CPU s", "")
    lines = [head]
    for row in sorted(rows, key=lambda row: (list(MODELS).index(row.task.model), row.task.dtype, row.task.sampling)):
        verdict = f"FAILED ({len(row.faults)})" if row.faults else f"equal but {len(row.notes)} near ties" if row.notes else "equal"
        count = f"{row.preempted} of {row.task.prompts}" if row.mode.startswith("pool") else "-"
        facts = (row.tokens, row.accepted, row.rejected, count, f"{row.seconds:.1f}", verdict)
        lines.append((row.task.model, row.task.dtype, row.task.sampling, row.drafter, row.mode, *map(str, facts)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
