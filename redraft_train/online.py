"""Trains a draft model on the places where its target corrected it, while an engine runs with --draft online:path=FOLDER.

Xiaoxuan Liu, Lanxiang Hu, Peter Bailis, Alvin Cheung, Zhijie Deng, Ion Stoica, Hao Zhang: Online Speculative Decoding, 2023,
arXiv 2310.07177.

1. Every `every` texts: one update a text by the forward divergence at the corrected places, over the noted tokens and the rest. As many
   older texts follow, so that what was learned is not lost.
2. Each eighth text is held out. Weights are written for the engine if they are better on the newest of these than the last written ones.

Example: python -m redraft_train.online --model DRAFT --path FOLDER
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from redraft.draft.online import DRAFT, TEXTS
from redraft_train.losses import distribution_of, forward_kl, with_rest

EVERY, RATE, OLD, HELD = 8, 1e-4, 256, 8  # texts before an update; of AdamW; texts that are kept; one of so many texts is held out
LONGEST = 512  # tokens of a text before its last corrected place


@dataclass(frozen=True)
class Text:
    """tokens: i64[T]; index: i64[N], of the corrected tokens; ids: i64[N, K]; logs: f32[N, K]."""

    tokens: Tensor
    index: Tensor
    ids: Tensor
    logs: Tensor

    @classmethod
    def read(cls, path: Path) -> Text | None:
        """What an engine wrote; None if it cannot be read, or is too long."""
        try:
            found = load_file(path)
        except (OSError, SafetensorError):
            return None
        end = int(found["index"].max()) + 1
        inside = found["index"] < LONGEST
        if not inside.any():
            return None
        return cls(found["tokens"][: min(end, LONGEST)].long(), *(found[name][inside] for name in ("index", "ids", "logs")))

    def loss(self, model: Any) -> Tensor:
        """The mean divergence at the corrected places, in nats. The distribution of token i is that of the row before it."""
        logits = model(input_ids=self.tokens[None], use_cache=False).logits[0, self.index.long() - 1]
        return forward_kl(with_rest(self.logs), distribution_of(logits, self.ids.long())).mean()


class Student:
    """model: of transformers, trained in place; base: its folder; out: where better weights are written."""

    def __init__(self, model: Any, base: Path, out: Path, *, every: int = EVERY, rate: float = RATE, seed: int = 0) -> None:
        self.model, self.base, self.out, self.every = model, base, out, every
        self.optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
        self.old: deque[Text] = deque(maxlen=OLD)
        self.held: deque[Text] = deque(maxlen=OLD // HELD)
        self.new: list[Text] = []
        self.written = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.dice, self.seen = random.Random(seed), 0

    def add(self, text: Text) -> bool:
        """Whether better weights were written after this text."""
        self.seen += 1
        if self.seen % HELD == HELD // 2:
            self.held.append(text)
            return False
        self.new.append(text)
        if len(self.new) < self.every:
            return False
        for one in [*self.new, *self.dice.sample(list(self.old), min(len(self.old), self.every))]:
            self.optimizer.zero_grad()
            one.loss(self.model).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        self.old.extend(self.new)
        self.new.clear()
        return self._write_if_better()

    @torch.no_grad()
    def measured(self) -> float:
        """The loss on held-out texts."""
        return float(torch.stack([text.loss(self.model) for text in self.held]).mean())

    def _write_if_better(self) -> bool:
        if not self.held:
            return False
        now = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        found = self.measured()
        self.model.load_state_dict(self.written)
        before = self.measured()
        self.model.load_state_dict(now)
        if found >= before:
            return False
        self.written = now
        write(self.model, self.base, self.out)
        return True


def write(model: Any, base: Path, out: Path) -> None:
    """The weights last, so that an engine never sees a part of them. All else is that of `base`."""
    out.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.suffix == ".json" and ".index" not in file.suffixes and not (out / file.name).exists():
            shutil.copy(file, out / file.name)
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    save_file(stored, partial := out / ".model.part", {"format": "pt"})
    os.replace(partial, out / "model.safetensors")


def main() -> None:
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(prog="python -m redraft_train.online", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the draft model")
    parser.add_argument("--path", type=Path, required=True, help="the folder that the engine writes to")
    parser.add_argument("--every", type=int, default=EVERY, help="texts before an update")
    parser.add_argument("--rate", type=float, default=RATE, help="the learning rate")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start = given.path / DRAFT if (given.path / DRAFT / "model.safetensors").exists() else given.model
    student = Student(
        AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        given.model,
        given.path / DRAFT,
        every=given.every,
        rate=given.rate,
    )
    while True:
        for path in sorted((given.path / TEXTS).glob("*.safetensors"), key=lambda one: one.stat().st_mtime_ns):
            text = Text.read(path)
            path.unlink()
            if text is not None and student.add(text):
                print(f"{student.seen} texts: better weights, {student.measured():.3f} nats on held-out texts", flush=True)
        time.sleep(1.0)


if __name__ == "__main__":
    main()
