"""Which parts of a checkpoint, and which policies, run in compiled kernels.

This is found by trial, not from a list. A small copy of the network with random weights generates a few tokens, once for each kind of
layer, quantization and policy. Every operation that the native backend passes on to the NumPy backend is noted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from redraft import registry
from redraft.bench.shapes import normal
from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.core.spec import Attention, Experts, LayerSpec, Mlp, ModelSpec, WeightSource
from redraft.engine.engine import Engine
from redraft.engine.policies import SEAMS
from redraft.errors import RedraftError
from redraft.models import loader
from redraft.models.checkpoint import SINGLE, Safetensors
from redraft.models.loader import Checkpoint
from redraft.models.runner import Runner
from redraft.ops import library
from redraft.ops.native import NativeOps
from redraft.ops.numpy_ops import NumpyOps
from redraft.sample.sampler import Sampler

WIDTH = 256  # hidden size, MLP size and vocabulary of the copy
PROMPT, NEW = 1500, 4  # tokens; more than the default budgets of policies
PAGES = 4 * (PROMPT // 32)
LAYERS, EXPERTS = 4, 4  # layers, at least and at most; some policies do not change the first two layers
OPERATIONS = {  # operation of the backend -> its name in the table
    "embed": "embedding",
    "norm": "norms",
    "linear": "linear layers",
    "activate": "MLP",
    "rope": "rotary positions",
    "attend": "attention",
    "experts": "experts",
    "head": "head",
}
ONCE = "embedding", "head"  # once for each model, not for each layer


class Part(NamedTuple):
    """backend: native, numpy or not tried; why: the operations that NumPy runs, or the reason."""

    name: str
    backend: str
    why: str = ""


class Handed(NumpyOps):
    """Notes each operation that reaches the NumPy backend. In `Trial` it is between NativeOps and NumpyOps."""

    def __init__(self, dtype: Any, device: Any = "cpu") -> None:
        self.handed: set[str] = set()
        super().__init__(dtype, device)


def _noting(name: str) -> Any:
    def operation(self: Handed, *arguments: Any) -> Any:
        self.handed.add(name)
        return getattr(super(Handed, self), name)(*arguments)

    return operation


for _name in OPERATIONS:
    setattr(Handed, _name, _noting(_name))


class Trial(NativeOps, Handed):
    """Native operations. What they pass to `super()` is noted before it reaches NumpyOps."""


@dataclass
class Copy:
    """A small network with random weights on disk, with the layers of `spec`."""

    spec: ModelSpec
    dtype: np.dtype[Any]
    folder: Path

    def checkpoint(self, quant: Any = None) -> Checkpoint:
        sources = {name: WeightSource((name,)) for name in self.spec.shapes()}
        return Checkpoint(self.folder, self.spec, self.dtype, (), sources, self.spec, Safetensors(self.folder), quant)

    @cached_property
    def plain(self) -> set[str]:
        return self.handed()

    def handed(self, quant: Any = None, seam: str = "", name: str = "") -> set[str]:
        """The operations that NumPy ran for the tokens after a prompt, with a policy if one is named. RedraftError if it cannot run."""
        backend, prompt = Trial(self.dtype), [i % WIDTH for i in range(PROMPT)]
        runner = Runner(self.spec, loader.read(self.checkpoint(quant), backend), backend, PAGES, sharing=False, quant=quant)
        policy = {seam: self._policy(runner, seam, name, prompt)} if seam else {}
        engine = _engine(runner)
        engine.add(Request("trial", prompt, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, **policy)))
        while engine.has_work and not engine.step():
            pass
        backend.handed.clear()
        while engine.has_work:
            engine.step()
        return backend.handed

    def _policy(self, runner: Runner, seam: str, name: str, prompt: list[int]) -> str:
        """A policy with its default options, calibrated if it needs that."""
        method: Any = registry.create(seam, name)
        if not hasattr(method, "calibrate"):
            return name
        return f"{name}:profile={method.calibrate(runner, [prompt]).save(self.folder / name)}"


def parts(checkpoint: Checkpoint) -> Iterator[Part]:
    """Yields all parts. A policy is tried with its default options."""
    served, why = library.serves(checkpoint.dtype, "cpu", checkpoint.spec)
    if served != "native":
        yield Part("all of it", served, why)
        return
    with tempfile.TemporaryDirectory() as folder:
        kinds = list(dict.fromkeys(checkpoint.spec.layers))
        for i, layer in enumerate(kinds):
            copy = _copy(checkpoint, (layer,), Path(folder) / str(i))
            found = _of_layer(copy, layer, "" if len(kinds) == 1 else f" ({_layers(checkpoint.spec, layer)})")
            yield from (part for part in found if not i or not part.name.startswith(ONCE))
        copy = _copy(checkpoint, tuple(islice(cycle(kinds), max(LAYERS, len(kinds)))), Path(folder) / "all")
        for name in registry.METHODS["quant"]:
            yield _tried(copy, f"weights: {name}", quant=registry.create("quant", name))
        for seam in SEAMS:
            for name in registry.METHODS[seam]:
                yield _tried(copy, f"{seam}: {name}", seam=seam, name=name)


def _of_layer(copy: Copy, layer: LayerSpec, which: str) -> Iterator[Part]:
    """One part for each operation of such a layer."""
    handed = copy.plain
    absent = {
        "activate" if isinstance(layer.mlp, Experts) else "experts",
        *([] if isinstance(layer.mixer, Attention) and layer.mixer.rotary else ["rope"]),
    }
    for name, called in OPERATIONS.items():
        if name not in absent:
            yield Part(called if called in ONCE else called + which, "numpy" if name in handed else "native")


def _tried(copy: Copy, what: str, **options: Any) -> Part:
    try:
        handed = copy.handed(**options) - copy.plain
    except RedraftError as error:
        return Part(what, "not tried", str(error))
    return Part(what, "numpy" if handed else "native", ", ".join(OPERATIONS[one] for one in OPERATIONS if one in handed))


def _copy(checkpoint: Checkpoint, layers: tuple[LayerSpec, ...], folder: Path) -> Copy:
    spec = checkpoint.spec
    learned = None if spec.learned_positions is None else PROMPT + 64
    small = replace(spec, vocab=WIDTH, hidden=WIDTH, context=PROMPT + 64, layers=tuple(map(_small, layers)), learned_positions=learned)
    generator = np.random.default_rng(0)
    folder.mkdir()
    save_file({name: normal(generator, shape, deviation=1 / 16) for name, shape in small.shapes().items()}, folder / SINGLE)
    return Copy(small, checkpoint.dtype, folder)


def _small(layer: LayerSpec) -> LayerSpec:
    mixer = layer.mixer
    if isinstance(mixer, Attention) and mixer.window:
        mixer = replace(mixer, window=min(mixer.window, PROMPT // 2))
    mlp: Mlp | Experts
    if isinstance(layer.mlp, Experts):
        mlp = replace(
            layer.mlp, count=min(EXPERTS, layer.mlp.count), top_k=min(2, layer.mlp.top_k), mlp=replace(layer.mlp.mlp, hidden=WIDTH)
        )
    else:
        mlp = replace(layer.mlp, hidden=WIDTH)
    return replace(layer, mlp=mlp, mixer=mixer)


def _layers(spec: ModelSpec, layer: LayerSpec) -> str:
    places = [i for i, one in enumerate(spec.layers) if one == layer]
    return f"layer {places[0]}" if len(places) == 1 else f"{len(places)} layers from {places[0]}"


def _engine(runner: Runner) -> Engine:
    verifier, drafter = registry.create("verify", "coupled"), registry.create("draft", "none")
    scheduler = registry.create("sched", "sarathi", token_budget=512, max_seqs=1, draft_rows=0, draft_total=0)
    sampler = Sampler(runner.spec.vocab, frozenset(), None, verifier.drafts, runner.backend.draw)
    return Engine(runner, scheduler, drafter.open(runner, sampler), verifier, sampler, max_model_len=runner.spec.context)
