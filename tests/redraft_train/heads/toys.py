"""A small random target, and texts that a head learns only from what its method reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from redraft.models import loader
from redraft_train import heads
from redraft_train.heads.head import Head, Outcome, Window
from redraft_train.target import Target
from tests.checkpoints import tiny_llama

LENGTH = 24
KEPT = np.arange(3, 200)


def target(folder: Path) -> Target:
    tiny_llama(folder, hidden_size=64)
    checkpoint = loader.inspect(folder)
    return Target.of(checkpoint.spec, loader.read(checkpoint))


def window(target: Target, tokens: Tensor, *, mask: Tensor | None = None) -> Window:
    """States, also of layer 0, are the embeddings of the tokens."""
    states = target.embedding[tokens].float()
    return replace(window_of(tokens, states, mask), layers={0: states})


def window_of(tokens: Tensor, state: Tensor, mask: Tensor | None = None) -> Window:
    """The distribution at each position is nearly sure of the next token."""
    after = tokens.roll(-1, 1)
    return Window(
        tokens=tokens,
        text=torch.zeros_like(tokens),
        positions=torch.arange(tokens.shape[1]).expand_as(tokens),
        state=state,
        top_ids=torch.stack([after, after + 1], -1),
        top_logits=torch.tensor([4.0, 0.0]).expand(*tokens.shape, 2),
        log_sum=torch.full(tokens.shape, 4.03),
        mask=torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask,
    )


def pairs(target: Target, seed: int, rows: int = 16) -> Window:
    """A random token, then its successor, and so on: who has not seen the random token cannot guess its successor, which alone counts."""
    random = torch.Generator().manual_seed(seed)
    first = torch.randint(10, 30, (rows, LENGTH // 2), generator=random)
    tokens = torch.stack([first, successor(first)], -1).flatten(1)
    mask = torch.tensor([True, False]).repeat(LENGTH // 2).expand_as(tokens)
    return window(target, tokens, mask=mask)


def chains(target: Target, seed: int, rows: int = 16) -> Window:
    """Each token is the successor of the one before."""
    tokens = [torch.randint(10, 30, (rows,), generator=torch.Generator().manual_seed(seed))]
    for _ in range(LENGTH - 1):
        tokens.append(successor(tokens[-1]))
    return window(target, torch.stack(tokens, 1))


def successor(tokens: Tensor) -> Tensor:
    return 10 + (tokens * 7 + 3) % 20


def trained(text: str, target: Target, steps: int, batch: object = chains, rate: float = 0.02) -> tuple[Head, Outcome]:
    """A head and its outcome on a batch that it was not trained on."""
    torch.manual_seed(0)
    head = heads.create(text, target, KEPT)
    optimizer = torch.optim.AdamW(head.parameters(), rate)
    for step in range(steps):
        head.loss(batch(target, step)).loss.backward()  # type: ignore[operator]
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return head, head.loss(batch(target, steps))  # type: ignore[operator]
