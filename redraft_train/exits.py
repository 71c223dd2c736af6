"""Trains a model so that its lower layers alone can say the next token, for drafts from an early exit (`--draft del`, `--draft s2d`).

    python -m redraft_train.exits MODEL --texts FILE... --out FOLDER

As in LayerSkip (Mostafa Elhoushi, Akshat Shrivastava, Diana Liskovich, et al., 2024, arXiv 2404.16710), layers are left out at random,
higher ones more often, and the loss is also taken behind some layers, through the own final norm and head. All weights are trained, so the
result is another model: FOLDER is complete, with tokenizer and config.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

COPIED = "tokenizer*", "*.jinja", "special_tokens_map.json", "vocab.*", "merges.txt", "generation_config.json"


@dataclass(frozen=True)
class Plan:
    """steps: of the optimizer, each over `rows` rows of `length` tokens; exits: depths with a loss besides the last; dropout: the
    probability that the last layer is left out; rate: the peak learning rate; seconds: the most time."""

    steps: int = 1000
    rows: int = 8
    length: int = 256
    exits: tuple[int, ...] = ()
    dropout: float = 0.1
    rate: float = 3e-4
    warmup: float = 0.05
    seconds: float = float("inf")
    seed: int = 0


def evenly(count: int, exits: int = 3) -> tuple[int, ...]:
    """So many depths between the first and the last of `count` layers."""
    return tuple(sorted({(i + 1) * count // (exits + 1) for i in range(exits)} - {0, count}))


def loss(model: Any, rows: Tensor, exits: Seq[int]) -> tuple[Tensor, list[float]]:
    """rows: i64[B, T]. The mean of the cross-entropies behind the layers `exits` and the last one, weighted by depth, and each of them."""
    out = model.model(rows, output_hidden_states=True, use_cache=False)
    total, found = torch.zeros(()), []
    depths = [*exits, len(model.model.layers)]
    for depth in depths:
        last = depth == depths[-1]
        x = out.last_hidden_state if last else model.model.norm(out.hidden_states[depth])
        one = F.cross_entropy(model.lm_head(x[:, :-1]).float().flatten(0, 1), rows[:, 1:].flatten())
        total = total + depth * one
        found.append(one.item())
    return total / sum(depths), found


def train(model: Any, tokens: Tensor, plan: Plan, show: Any = lambda line: None) -> None:
    """Trains `model`, of transformers with `model.layers`, in place. tokens: i64[N], the text, of which rows are cut at random."""
    model.train().requires_grad_(True)
    layers, count = model.model.layers, len(model.model.layers)
    exits = plan.exits or evenly(count)
    torch.manual_seed(plan.seed)
    dice = np.random.default_rng(plan.seed)
    chances = [plan.dropout * (2 ** (i / max(1, count - 1)) - 1) for i in range(count)]
    dropped = [False] * count

    def hook(layer: int) -> Any:
        def act(module: Any, given: Any, named: Any, out: Any) -> Any:
            x = given[0] if given else named["hidden_states"]
            return out if not dropped[layer] else (x, *out[1:]) if isinstance(out, tuple) else x

        return act

    holds = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    began = shown = time.monotonic()
    for step in range(plan.steps):
        share = max(step / plan.steps, (time.monotonic() - began) / plan.seconds)
        if share >= 1:
            break
        dropped[:] = (dice.random(count) < chances).tolist()
        starts = dice.integers(len(tokens) - plan.length, size=plan.rows)
        rows = torch.stack([tokens[start : start + plan.length] for start in starts.tolist()])
        whole, each = loss(model, rows, exits)
        whole.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * min(1.0, share / plan.warmup, (1 - share) / (1 - plan.warmup))
        optimizer.step()
        optimizer.zero_grad()
        if step == 0 or time.monotonic() - shown > 10:
            shown = time.monotonic()
            behind = "  ".join(f"{depth}: {one:.2f}" for depth, one in zip([*exits, count], each, strict=True))
            show(f"step {step:5d}  {(step + 1) * rows.numel():9,d} tokens  loss behind layer {behind}")
    for hold in holds:
        hold.remove()
    model.eval()


def save(model: Any, source: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """A complete folder: the weights, the config, and the tokenizer files of `source`."""
    model.to(dtype).save_pretrained(out)
    for pattern in COPIED:
        for file in source.glob(pattern):
            shutil.copy(file, out / file.name)


def main() -> None:
    from transformers import AutoModelForCausalLM

    from redraft.errors import RedraftError
    from redraft.models import loader
    from redraft.models.tokenizer import Tokenizer

    parser = argparse.ArgumentParser(prog="python -m redraft_train.exits", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--rate", type=float, default=Plan.rate)
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="the most time")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"--out {given.out}: exists; name a new folder")
    try:
        source = loader.resolve(given.model)
        tokenizer = Tokenizer(source)
        tokens = [token for file in given.texts for token in tokenizer.encode(file.read_text(encoding="utf-8"))]
    except (RedraftError, OSError, UnicodeDecodeError) as error:
        parser.error(str(error))
    plan = Plan(given.steps, rate=given.rate, seconds=given.seconds, seed=given.seed)
    if len(tokens) <= plan.length:
        parser.error(f"--texts: {len(tokens)} tokens; more than {plan.length} are needed")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    train(model, torch.tensor(tokens), plan, partial(print, flush=True))
    save(model, source, given.out)
    print(f"wrote {given.out}; use it as a model, with --draft del")


if __name__ == "__main__":
    main()
