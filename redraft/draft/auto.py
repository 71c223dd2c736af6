"""Merges the drafts that cost nothing to make, drafts as many nodes as pay on this machine, and stops where drafts do not pay.

The drafters are configuration; see `Auto.parts`. planner.py chooses the nodes, acceptance.py their probabilities, payoff.py stops drafters
that lose, and core/cost.py knows the time of a step. Times are measured between requests, after the first reply, and kept for the next
process in the user's cache folder.

Sources: Gabriele Oliaro, Zhihao Jia, Daniel Campos, Aurick Qiao: SuffixDecoding: Extreme Speculative Decoding for Emerging AI
Applications, 2024, arXiv 2411.04975 (matches and their scores); for the planner see planner.py.

Differs: candidates of several drafters are merged before their probability is estimated.
"""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from redraft import registry
from redraft.card import Card, Guarantee
from redraft.core.cost import FLAT, STEEP, CostModel, Sizes
from redraft.core.spec import Attention
from redraft.core.tree import Kind
from redraft.draft.compiled import CompiledPlanner, bind, fits
from redraft.draft.drafter import Drafter, max_bytes
from redraft.draft.planner import Planner
from redraft.errors import CheckpointError, InvalidInput
from redraft.kept import folder
from redraft.models.trained import Trained
from redraft.ops import library

MOST_PARTS = 6  # the weights of agreement grow by a factor of four with each
DRAFT_MODEL = "draft-model"  # joins the parts if the engine has a draft model


@dataclass(frozen=True)
class Auto:
    """parts: drafters joined by +, each with its options in parentheses. Those that this version does not have are left out. head: a
    folder of `redraft train`; the drafter that it was trained for joins the parts."""

    parts: str = "suffix+ngram+token-recycling"
    head: Path | None = None

    card: ClassVar[Card] = Card(
        "Planned drafts",
        "Oliaro, Jia, Campos, Qiao, SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications, 2024, arXiv 2411.04975",
        Guarantee.SAME_TEXT,
        deviates="candidates of several drafters are merged; as many are drafted as pay, none where none do",
        summary="Chooses drafts and their number itself; the default",
    )

    def __post_init__(self) -> None:
        if not registry.split(self.parts, "+"):
            raise InvalidInput(f"auto:parts={self.parts}: drafters joined by + are needed")
        if len(self.made()) > MOST_PARTS:
            raise InvalidInput(f"auto:parts={self.parts}: at most {MOST_PARTS} drafters are allowed")

    def made(self) -> dict[str, Drafter]:
        """The parts that this version has."""
        texts = registry.split(self.parts, "+")
        default = self.parts == type(self).parts
        known = [text for text in texts if not default or registry.parse(text)[0] in registry.METHODS["draft"]]
        made = {text: registry.create("draft", text) for text in known}
        return made if self.head is None else {**made, **self.trained(self.head.expanduser())}

    def trained(self, path: Path) -> dict[str, Drafter]:
        """The drafter that reads this file."""
        if not path.exists():
            raise InvalidInput(f"auto:head={self.head}: no such file or folder")
        name = Trained.reader(path)
        if name not in registry.METHODS["draft"] or "path" not in registry.options(cls := registry.method("draft", name)):
            raise InvalidInput(f"auto:head={self.head}: a file of {name}, which is no drafter with a trained file")
        return {name: cast(Drafter, cls(path=path))}

    def max_bytes(self, runner: Any) -> int:
        return sum(max_bytes(part, runner) for part in self.made().values())

    def open(self, runner: Any, sampler: Any) -> Planner:
        made = self.made()
        known = {registry.parse(text)[0] for text in made}
        if runner.draft_model is not None and DRAFT_MODEL in registry.METHODS["draft"] and DRAFT_MODEL not in known:
            made[DRAFT_MODEL] = registry.create("draft", DRAFT_MODEL)
        opened = {name: part.open(runner, sampler) for name, part in made.items()}
        if not sampler.exact:  # a merged tree has fixed children, which is only right for sampled ones if the noise is the target's
            opened = {name: part for name, part in opened.items() if part.kinds <= {Kind.FIXED}}
        names, parts, cost = list(opened), list(opened.values()), cost_of(runner)
        loaded = library.load()
        compiled = bind(loaded.c) if loaded is not None and all(map(fits, parts)) else None
        if compiled is not None:
            return CompiledPlanner(compiled, names, parts, cost, timed=sampler.exact)
        return Planner(names, parts, cost, timed=sampler.exact)


def cost_of(runner: Any) -> CostModel:
    """The cost model of this machine, model, weights and backend: as it was measured before, else the prior."""
    backend, spec = runner.backend, runner.spec
    isa = getattr(getattr(backend, "library", None), "isa", "")
    shapes = spec.shapes()
    params = sum(rows * cols for name, (rows, *rest) in shapes.items() if name not in ("embed", "positions") for cols in rest)
    params += 0 if "head" in shapes else spec.vocab * spec.hidden
    attention = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, Attention)]
    sizes = Sizes(
        weights=max(float(runner.weights.bytes), 1.0),
        flops=2.0 * params,
        kv=float(sum(4 * one.kv_heads * one.head_dim for one in attention)),  # two numbers of 2 bytes
        cell=float(sum(4 * one.heads * one.head_dim for one in attention)),
    )
    flat = str(backend.device) != "cpu" or isa == "amx"
    key = (
        repr(spec),
        str(runner.quant),
        type(backend).__name__,
        isa,
        getattr(backend, "threads", 0),
        runner.weights.bytes,
        machine(),
        library.fingerprint(),
    )
    try:
        path = folder("cost") / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.json"
    except CheckpointError:
        path = None
    return CostModel(FLAT if flat else STEEP, sizes, path)


def machine() -> str:
    """The model of the processor and the number of its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} x{os.cpu_count()}"
