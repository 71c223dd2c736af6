"""One training from prompts to a folder that `--draft HEAD:path=FOLDER` takes: texts, states, the head, its card."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from redraft.bench import files
from redraft.bench.prompts import Prompt
from redraft.errors import CheckpointError, InvalidInput
from redraft.models import loader
from redraft.models.frequent import kept
from redraft.models.trained import model_hash
from redraft_train import budget, folder, states, texts
from redraft_train.heads import create, options
from redraft_train.heads.head import Head
from redraft_train.progress import Progress, left, trained, training
from redraft_train.states import States
from redraft_train.target import Target
from redraft_train.train import Measured, Plan, Trainer

if TYPE_CHECKING:
    from redraft.llm import LLM

ABOUT = "about.json"


@dataclass(frozen=True)
class Order:
    """What to train. head: "name:option=value,..."; seconds: the budget; data: the folder of texts and states; kept: tokens that the head
    can draft; max_tokens: of an answer; steps, texts: instead of shares of the budget; compared: whether a share of the budget is left
    for a comparison."""

    head: str
    out: Path
    data: Path
    seconds: float
    kept: int = 8192
    max_tokens: int = 256
    seed: int = 0
    steps: int | None = None
    texts: int | None = None
    rate: float | None = None
    compared: bool = True

    @property
    def work(self) -> Path:
        """Files of an unfinished run."""
        return self.out / "work"

    def check(self) -> None:
        """InvalidInput before anything is loaded."""
        options(self.head)
        for name, least in (("kept", 1), ("max_tokens", 1), ("steps", 1), ("texts", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidInput(f"--{name.replace('_', '-')} = {value}: must be {least} or more")
        if self.rate is not None and not 0 < self.rate < 1:
            raise InvalidInput(f"--rate = {self.rate}: must be above 0 and below 1")
        for option, path in (("out", self.out), ("data", self.data)):
            if path.exists() and not path.is_dir():
                raise InvalidInput(f"--{option} = {path}: is a file; a folder is needed")
        if folder.finished(self.out):
            raise InvalidInput(f"--out = {self.out}: has a trained head; remove it or name another folder")


@dataclass(frozen=True, eq=False)
class Made:
    """A finished training. steps, read: of training, and the tokens that it read, with repetition; held: the prompts that are held out;
    seconds: of each stage."""

    head: Head
    measured: Measured
    states: States
    steps: int
    read: int
    held: list[Prompt]
    seconds: dict[str, float]


def run(llm: LLM, order: Order, prompts: list[Prompt], progress: Progress) -> Made:
    """Everything but the comparison. An interrupted run goes on where it stopped if it is called again with the same order."""
    torch.set_num_threads(llm.runner.backend.threads)
    training_prompts, held = texts.split(prompts)
    model, source = model_hash(llm.runner), llm.setup.checkpoint.path
    target = Target.of(llm.runner.spec, loader.read(loader.inspect(source)))
    head = _head(order, target, np.arange(1))  # for its layers
    folder.check(head.method, source)
    _claim(order, model, prompts)
    took = _Took(order.work)
    found = _data(llm, order, training_prompts, held, head.layers, took, progress)
    tokens = found.tokens[~np.repeat(found.held, np.diff(found.starts))]
    keep = kept(tokens, order.kept, llm.tokenizer, llm.eos, llm.runner.spec.vocab)
    head = _head(order, target, keep)
    reserve = budget.COMPARISON * order.seconds if order.compared else 0.0
    rest = max(0.1 * order.seconds, order.seconds - reserve - took.total)
    plan = Plan(rest, order.steps, order.rate, seed=order.seed)
    trainer = Trainer(head, found, plan, order.work / "checkpoint.pt", tag=f"{model} {order.head} {_digest(keep)} {len(found.tokens)}")
    with progress.stage("training"):
        measured = trainer.run(lambda moment: progress.show(training(moment)))
        progress.show(trained(trainer.at.tokens, measured))
    took.set("training", trainer.at.seconds)
    return Made(head, measured, found, trainer.at.step, trainer.at.tokens, held, took.seconds)


def save(llm: LLM, made: Made, order: Order, card: str) -> None:
    """Writes the folder and removes what only an unfinished run needs."""
    folder.write(made.head, order.out, model_hash(llm.runner), llm.setup.checkpoint.path, card)
    shutil.rmtree(order.work, ignore_errors=True)


def _head(order: Order, target: Target, keep: np.ndarray[Any, Any]) -> Head:
    torch.manual_seed(order.seed)
    return create(order.head, target, keep)


def _data(
    llm: LLM, order: Order, prompts: list[Prompt], held: list[Prompt], layers: tuple[int, ...], took: _Took, progress: Progress
) -> States:
    """The states of the data folder. What is there already is used as it is."""
    kept_states, file = order.data / "states", order.data / "texts.jsonl"
    if kept_states.exists():
        found = States.open(kept_states)
        if set(layers) <= set(found.layers):
            progress.say(f"states    {len(found.tokens):,} tokens, of {kept_states}")
            return found
        layers = tuple(sorted({*layers, *found.layers}))
    writer = texts.Writer(llm.sibling(draft="auto"), file, prompts, held, max_tokens=order.max_tokens, seed=order.seed)
    written, share = list(writer.texts), budget.TEXTS * order.seconds - took.seconds.get("texts", 0.0)
    if not kept_states.exists():
        before, limited = sum(text.written for text in written), order.texts is not None
        total = before

        def wrote(tokens: int) -> None:
            nonlocal total
            total += tokens
            speed = (total - before) / progress.seconds
            rest = f"{order.texts} wanted" if limited else left(share - progress.seconds)
            progress.show(f"{len(writer.texts):,} texts, {total:,} tokens written, {speed:,.0f} tok/s, {rest}")

        with progress.stage("texts"), took.stage("texts"):
            written = writer.run(float("inf") if limited else max(0.0, share), order.texts, wrote)
    if {text.held for text in written} != {True, False}:
        raise InvalidInput(f"--prompts: no text was written, all prompts are longer than the context of {llm.max_model_len} tokens")
    total, ran = sum(len(text.tokens) for text in written), 0

    def passed(rows: int) -> None:
        nonlocal ran
        ran += rows
        speed = ran / progress.seconds
        progress.show(f"{ran:,} of {total:,} tokens, {speed:,.0f} tok/s, {left((total - ran) / speed)}")

    limit = float("inf") if order.texts is not None else budget.STATES * order.seconds
    with progress.stage("states"), took.stage("states"):
        return states.write(llm.runner, written, kept_states, layers, seconds=limit, tick=passed)


def _claim(order: Order, model: str, prompts: list[Prompt]) -> None:
    """Makes the folders. InvalidInput if the data folder has texts of another model, other prompts or other lengths."""
    file = order.data / ABOUT
    digest = sha256("\n".join(prompt.content for prompt in prompts).encode()).hexdigest()
    about = {"model": model, "prompts": digest, "max_tokens": order.max_tokens, "seed": order.seed}
    try:
        order.data.mkdir(parents=True, exist_ok=True)
        order.work.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            files.write(file, about)
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"cannot write {error.filename}: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{file}: not a file that redraft train wrote") from None
    for name, value in about.items():
        if found.get(name) != value:
            raise InvalidInput(f"--data = {order.data}: its texts are of another {name}; name another folder, or remove it")


def _digest(array: np.ndarray[Any, Any]) -> str:
    return sha256(array.tobytes()).hexdigest()[:16]


class _Took:
    """Seconds of each stage, over all runs of an order."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "seconds.json"
        self.seconds: dict[str, float] = json.loads(self.file.read_text()) if self.file.exists() else {}

    @property
    def total(self) -> float:
        """Of the stages before training, which counts its own."""
        return sum(seconds for name, seconds in self.seconds.items() if name != "training")

    def set(self, name: str, seconds: float) -> None:
        self.seconds[name] = seconds
        files.write(self.file, self.seconds)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began, before = time.monotonic(), self.seconds.get(name, 0.0)
        try:
            yield
        finally:
            self.set(name, before + time.monotonic() - began)
