"""A model's states and next-token distributions for its own texts, computed once by redraft's runner and kept as arrays on disk."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from redraft.config import SamplingParams
from redraft.core.batch import Batch
from redraft.core.plan import Accepted, Work
from redraft.core.sequence import UNLIMITED, Request, Sequence, Wants
from redraft.core.taps import Taps
from redraft.core.tree import EMPTY
from redraft.errors import CheckpointError
from redraft.models.runner import Runner
from redraft.ops.arrays import BFLOAT16, array
from redraft.ops.backend import best_first
from redraft.ops.format import PAGE

if TYPE_CHECKING:
    from redraft_train.texts import Text

KEPT = 32  # likeliest tokens of each position
ROWS, TEXTS = 256, 32  # of a forward pass, at most
ABOUT = "about.json"


@dataclass(frozen=True, eq=False)
class States:
    """N tokens of M texts, opened without being read. Text m is tokens[starts[m]:starts[m + 1]].

    tokens: i32[N]; starts: i64[M + 1]; answer: bool[N], the model wrote this token, its prompt did not have it; held: bool[M], the text
    of a prompt that is not trained on; final: uint16[N, hidden], the bits of bfloat16, states after the last layer and the final norm, as
    the head reads them; layers: layer -> uint16[N, hidden], its output without a norm; top_ids: i32[N, K], the likeliest tokens after
    each position, best first; top_logits: f32[N, K], their logits as sampling uses them; log_sum: f32[N], the log of the sum of exp of
    all logits, so top_logits - log_sum are log-probabilities at temperature 1.
    """

    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    answer: NDArray[np.bool_]
    held: NDArray[np.bool_]
    final: NDArray[np.uint16]
    layers: dict[int, NDArray[np.uint16]]
    top_ids: NDArray[np.int32]
    top_logits: NDArray[np.float32]
    log_sum: NDArray[np.float32]

    @classmethod
    def open(cls, folder: Path) -> States:
        """CheckpointError if the folder is not complete."""
        try:
            layers = json.loads((folder / ABOUT).read_text())["layers"]
            starts = np.load(folder / "starts.npy")
            whole = {name: np.load(folder / f"{name}.npy", mmap_mode="r")[: starts[-1]] for name in _names(layers)}
            held = np.load(folder / "held.npy")
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: not a complete folder of states: {' '.join(str(error).split())}") from None
        states = {layer: whole[f"state-{layer}"] for layer in layers}
        rest = {name: whole[name] for name in ("tokens", "answer", "top_ids", "top_logits", "log_sum")}
        return cls(**rest, starts=starts, held=held, final=whole["state-final"], layers=states)


def write(
    runner: Runner,
    texts: Seq[Text],
    folder: Path,
    layers: Seq[int] = (),
    *,
    seconds: float = float("inf"),
    tick: Callable[[int], None] = lambda rows: None,
) -> States:
    """Runs the texts in order, as many as fit in `seconds` and at least one, and writes what States describes. layers: whose outputs are
    kept too. tick: gets the number of tokens of each pass. The folder gets its name when it is complete; a folder of that name is
    replaced."""
    began = time.monotonic()
    total, spec = sum(len(text.tokens) for text in texts), runner.spec
    longest = max(len(text.tokens) for text in texts)
    own = Runner(spec, runner.weights, runner.backend, -(-max(longest, ROWS) // PAGE) + TEXTS, source=runner.source)
    taps = Taps(hidden=frozenset({len(spec.layers) - 1, *layers}), logits=True)
    with _renamed(folder) as partial:
        files = _allocate(partial, total, spec.hidden, min(KEPT, spec.vocab), layers)
        starts, held = [0], list[bool]()
        for group in _groups(texts):
            if held and time.monotonic() - began > seconds:
                break
            at = starts[-1]
            for text in group:
                files["tokens"][starts[-1] : starts[-1] + len(text.tokens)] = text.tokens
                for first, last in text.answers:
                    files["answer"][starts[-1] + first : starts[-1] + last] = True
                starts.append(starts[-1] + len(text.tokens))
                held.append(text.held)
            for rows, found in _passes(own, group, taps):
                _store(own, files, at, found, layers)
                at += rows
                tick(rows)
        for one in files.values():
            one.flush()
        np.save(partial / "starts.npy", np.asarray(starts, np.int64))
        np.save(partial / "held.npy", np.asarray(held, np.bool_))
        (partial / ABOUT).write_text(json.dumps({"layers": sorted(layers)}))
    return States.open(folder)


def _names(layers: Seq[int]) -> dict[str, tuple[str, Any]]:
    """Name of a file -> (what a row of it has, dtype)."""
    states = {f"state-{layer}": ("hidden", np.uint16) for layer in ("final", *layers)}
    ids = {"top_ids": ("kept", np.int32), "top_logits": ("kept", np.float32)}
    return {"tokens": ("", np.int32), "answer": ("", np.bool_), **states, **ids, "log_sum": ("", np.float32)}


def _allocate(folder: Path, total: int, hidden: int, kept: int, layers: Seq[int]) -> dict[str, Any]:
    widths = {"": (), "hidden": (hidden,), "kept": (kept,)}
    return {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (total, *widths[width]))
        for name, (width, dtype) in _names(layers).items()
    }


@contextmanager
def _renamed(folder: Path) -> Iterator[Path]:
    """A folder that gets the name `folder` at the end of the block."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _groups(texts: Seq[Text]) -> Iterator[list[Text]]:
    """Short texts together, up to TEXTS of them and ROWS tokens; each longer text alone."""
    group, rows = list["Text"](), 0
    for text in texts:
        if group and (rows + len(text.tokens) > ROWS or len(group) == TEXTS):
            yield group
            group, rows = [], 0
        group.append(text)
        rows += len(text.tokens)
    if group:
        yield group


def _passes(runner: Runner, group: Seq[Text], taps: Taps) -> Iterator[tuple[int, Any]]:
    """(rows, result) of each forward pass: one for a group of short texts, several for a long text."""
    seqs = []
    for i, text in enumerate(group):
        tokens = [*map(int, text.tokens)]
        request = Request("states", tokens, SamplingParams(), wants=Wants(prompt_logprobs=0))
        seqs.append(Sequence(i, request, 0, tokens, len(tokens), seed=0, sync_point=UNLIMITED))
    for seq in seqs:
        runner.memory.open(seq)
    try:
        while seqs[0].pending:
            work = [Work(seq, min(seq.pending, ROWS)) for seq in seqs]
            yield _rows(work), runner.forward(Batch.pack(work, [EMPTY] * len(work), runner.memory.reserve(work, [EMPTY] * len(work))), taps)
            runner.memory.commit(work, [Accepted()] * len(work))
    finally:
        for seq in seqs:
            runner.memory.free(seq)


def _rows(work: Seq[Work]) -> int:
    return sum(one.rows for one in work)


def _store(runner: Runner, files: dict[str, Any], at: int, found: Any, layers: Seq[int]) -> None:
    logits, rows = array(found.logits), slice(at, at + len(found.argmax))
    files["state-final"][rows] = _bits(runner.normed(found.hidden[len(runner.spec.layers) - 1]))
    for layer in layers:
        files[f"state-{layer}"][rows] = _bits(array(found.hidden[layer]))
    ids = best_first(logits, files["top_ids"].shape[1])
    files["top_ids"][rows] = ids
    files["top_logits"][rows] = best = np.take_along_axis(logits, ids.astype(np.int64), -1)
    files["log_sum"][rows] = np.log(np.exp(logits - best[:, :1]).sum(-1, dtype=np.float64)) + best[:, 0]


def _bits(states: NDArray[Any]) -> NDArray[np.uint16]:
    return states.astype(BFLOAT16).view(np.uint16)
