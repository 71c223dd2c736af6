"""Brings the distribution of a draft model close to that of its target.

Yongchao Zhou, Kaifeng Lyu, Ankit Singh Rawat, et al.: DistillSpec, 2023, arXiv 2310.08461; Raghavv Goel, Mukul Gagrani, Wonseok Jeon, et
al.: Direct Alignment of Draft Model, 2024, arXiv 2403.00858; Ofir Zafrir, Igor Margulis, Dorin Shteyman, Guy Boudoukh: FastDraft, 2024,
arXiv 2411.11055.

1. The target continues prompts at temperature 1, once.
2. Of the steps, the share `on_policy` learns from texts that the draft samples itself for these prompts, the others from those of 1.
3. At each place that follows a prompt, `loss` compares the distributions of target and draft over the whole vocabulary; `tokens` is the
   cross-entropy of the text's tokens, which knows no distribution.

DistillSpec is any loss with on_policy > 0; direct alignment is tvd++ and FastDraft is tokens, both with on_policy = 0, after a training
on other texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from redraft.errors import InvalidInput, shown
from redraft.options import Options, number
from redraft_train.losses import LOSSES, total_variation

TOKENS = "tokens"
WARMUP = 0.05  # of the steps; then the rate falls to 0 linearly


@dataclass(frozen=True)
class Plan(Options):
    """loss: a name of LOSSES, or `tokens`; batch: texts a step; rate: of AdamW at its peak."""

    loss: str = "jsd"
    steps: int = number(1000, ge=1)
    batch: int = number(16, ge=1)
    on_policy: float = number(0.5, ge=0, le=1)
    rate: float = number(5e-4, gt=0)
    seed: int = number(0, ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in (*LOSSES, TOKENS):
            raise InvalidInput(f"loss = {shown(self.loss)}: must be {', '.join(LOSSES)} or {TOKENS}")


def distil(
    draft: Any, target: Any, texts: Tensor, prompt: int, plan: Plan, tick: Callable[[int, float], None] = lambda step, loss: None
) -> None:
    """Trains `draft` in place. draft, target: models of transformers with one vocabulary; texts: i64[N, prompt + length], prompts with the
    target's continuations (see `continued`); tick: gets each step and its loss in nats."""
    random = torch.Generator().manual_seed(plan.seed)
    optimizer = torch.optim.AdamW(draft.parameters(), plan.rate, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(plan.steps):
        chosen = texts[torch.randint(len(texts), (plan.batch,), generator=random)]
        own = bool(torch.rand((), generator=random) < plan.on_policy)
        if own:
            chosen = continued(draft, chosen[:, :prompt], texts.shape[1] - prompt, random)
        loss = _loss(draft, target, chosen, prompt, plan.loss)
        loss.backward()
        nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        share = step / plan.steps
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * min(1.0, (share + 1 / plan.steps) / WARMUP, (1 - share) / (1 - WARMUP))
        optimizer.step()
        optimizer.zero_grad()
        tick(step, loss.item())


def _loss(draft: Any, target: Any, texts: Tensor, prompt: int, name: str) -> Tensor:
    q = distributions(draft, texts, prompt)
    if name == TOKENS:
        return -q.gather(-1, texts[:, prompt:, None]).mean()
    with torch.no_grad():
        p = distributions(target, texts, prompt)
    return LOSSES[name](p, q).mean()


def distributions(model: Any, texts: Tensor, prompt: int) -> Tensor:
    """f32[N, length, V]: log-probabilities of each token after the prompts."""
    logits: Tensor = model(input_ids=texts[:, :-1], use_cache=False).logits[:, prompt - 1 :]
    return logits.float().log_softmax(-1)


@torch.no_grad()
def continued(model: Any, prompts: Tensor, length: int, random: torch.Generator) -> Tensor:
    """i64[N, P] -> i64[N, P + length], sampled at temperature 1. Nothing ends a text."""
    tokens, cache = prompts, None
    for _ in range(length):
        found = model(input_ids=tokens if cache is None else tokens[:, -1:], past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        p = found.logits[:, -1].float().softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=random)], 1)
    return tokens


@torch.no_grad()
def acceptance(draft: Any, target: Any, texts: Tensor, prompt: int, batch: int = 32) -> float:
    """The mean of sum min(p, q) at temperature 1: the share of drafted tokens that sampling accepts. texts: as in `distil`, best others."""
    parts = [1 - total_variation(distributions(target, part, prompt), distributions(draft, part, prompt)) for part in texts.split(batch)]
    return float(torch.cat(parts).mean())


def speedup(block_efficiency: float, cost: float, drafted: int) -> float:
    """What a draft model gains on a machine whose time is that of reading weights. block_efficiency: tokens of a step; cost: time of a
    draft token over that of a step; drafted: tokens of a step.

    >>> speedup(3.0, 0.1, 5)
    2.0
    """
    return block_efficiency / (cost * drafted + 1)
