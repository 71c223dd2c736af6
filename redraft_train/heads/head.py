"""What all heads share: windows of texts, the target's trimmed head, and the loss over it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from redraft.ops.torch_arrays import as_tensor
from redraft_train.target import Target, to_numpy

Arrays = Mapping[str, NDArray[Any]]

DECAY = 0.8  # the weight of a depth in the loss, over that of the depth before


@dataclass(frozen=True, eq=False)
class Window:
    """Consecutive positions of texts, [B, T] each. Position t of a text holds token t.

    tokens: i64[B, T]; text: i64[B, T], equal within a text, -1 where there is none; positions: i64[B, T], within the text; state:
    [B, T, hidden], behind the final norm; top_ids: i64[B, T, K], the likeliest next tokens, best first; top_logits: f32[B, T, K];
    log_sum: f32[B, T], the log-sum-exp of all logits; mask: bool[B, T], whether the distribution at a position counts; layers: the states
    after the layers that the head names in `layers`, not normed.
    """

    tokens: Tensor
    text: Tensor
    positions: Tensor
    state: Tensor
    top_ids: Tensor
    top_logits: Tensor
    log_sum: Tensor
    mask: Tensor
    layers: Mapping[int, Tensor] = field(default_factory=dict)

    def distributions(self, ahead: int) -> Distributions:
        """The distributions of the token `ahead` positions after the next one, for the first T - 1 - ahead positions."""
        here, there = slice(0, self.tokens.shape[1] - 1 - ahead), slice(ahead, self.tokens.shape[1] - 1)
        same = (self.text[:, here] == self.text[:, ahead + 1 :]) & (self.text[:, here] >= 0)
        logs = self.top_logits[:, there] - self.log_sum[:, there, None]
        return Distributions(self.top_ids[:, there], logs, self.tokens[:, ahead + 1 :], same & self.mask[:, there])


class Distributions(NamedTuple):
    """What the target says at some places: the likeliest tokens, i64[..., K], and their log-probabilities; the token that the text has,
    and whether the place counts."""

    ids: Tensor
    logs: Tensor
    token: Tensor
    counts: Tensor


class Outcome(NamedTuple):
    """loss: a scalar; hits, all_hits, counts: i64[depths]. Of `counts` places the text's token was the likeliest at `hits`, and at
    `all_hits` also at all depths before."""

    loss: Tensor
    hits: Tensor
    all_hits: Tensor
    counts: Tensor


class Rows(nn.Module):
    """The rows of the target's head that a drafter uses. They are frozen and not in the file, unless `trained`."""

    place: Tensor
    rows: Tensor

    def __init__(self, target: Target, kept: NDArray[Any], trained: bool) -> None:
        super().__init__()
        kept = np.asarray(kept, np.int64)
        if not len(kept) or kept[0] < 0 or kept[-1] >= len(target.head) or (np.diff(kept) <= 0).any():
            raise ValueError(f"kept: ascending ids below {len(target.head)} are needed")
        self.kept, self.trained = kept, trained
        self.factor, self.limit = target.spec.logit_scale, target.spec.logit_softcap
        place = torch.full((len(target.head),), len(kept))
        place[torch.from_numpy(kept)] = torch.arange(len(kept))
        self.register_buffer("place", place, persistent=False)
        rows = target.head[torch.from_numpy(kept)]
        if trained:
            self.rows = nn.Parameter(rows.float())
        else:
            self.register_buffer("rows", rows.clone(), persistent=False)

    def loss(self, states: Tensor, distributions: Distributions) -> tuple[Tensor, Tensor]:
        """states [N, hidden] -> (the sum of their cross-entropies to the distributions in nats, in which tokens that are not kept count
        nothing; bool[N] whether the text's token is the likeliest). distributions: of the same N places."""
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        rows = self.rows.to(dtype)
        total, best = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
            states.to(dtype), rows, self.place[distributions.ids], distributions.logs.exp(), self.factor, self.limit
        )
        return total, best == self.place[distributions.token]


CHUNK = 1024  # rows of logits that are in memory at once


class _CrossEntropy(torch.autograd.Function):
    """The cross-entropy of logits x rows^T to distributions, summed over all x, and the likeliest row of each x. The gradients are made
    with the sum, so that no logits are stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor, p: Tensor, factor: float, limit: float | None) -> tuple[Tensor, Tensor]:
        inside = places < len(rows)
        places, p = places.where(inside, 0), p.where(inside, 0.0)
        to_x, to_rows = ctx.needs_input_grad[:2]
        total, best, grads = torch.zeros(()), [places.new_zeros(0)], [x[:0]]
        grad_rows = torch.zeros(rows.shape) if to_rows else None
        for part, at, distribution in zip(x.split(CHUNK), places.split(CHUNK), p.split(CHUNK), strict=True):
            logits = (part @ rows.T).float().mul_(factor)
            if limit is not None:
                logits = logits.div_(limit).tanh_().mul_(limit)
            slope = factor if limit is None else factor * (1 - (logits / limit).square())
            most, place = logits.max(-1)
            best.append(place)
            mass, picked = distribution.sum(-1), (distribution * logits.gather(-1, at)).sum()
            q = logits.sub_(most[:, None]).exp_()
            sums = q.sum(-1)
            total += (mass * (sums.log() + most)).sum() - picked
            if to_x or to_rows:
                grad = q.mul_((mass / sums)[:, None]).scatter_add_(-1, at, -distribution)
                grad = grad.mul_(slope).to(rows.dtype)
                grads.append(grad @ rows)
                if grad_rows is not None:
                    grad_rows += grad.T @ part
        ctx.save_for_backward(torch.cat(grads), grad_rows)
        ctx.mark_non_differentiable(found := torch.cat(best))
        return total, found

    @staticmethod
    def backward(ctx: Any, weight: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad, grad_rows = ctx.saved_tensors
        to_rows = None if grad_rows is None else (grad_rows * weight).to(grad.dtype)
        return grad * weight.to(grad.dtype), to_rows, None, None, None, None


class Joined(nn.Module):
    """A linear layer without bias over a state followed by `count` embeddings of tokens. It starts with the gains `identity` on the
    state's diagonal. Embeddings are multiplied by `scale`, so that they learn as fast as the state; files hold the products."""

    columns: Tensor

    def __init__(self, hidden: int, count: int, scale: float, identity: Tensor | float = 1.0) -> None:
        super().__init__()
        start = torch.zeros(hidden, hidden * (count + 1))
        start[:, :hidden] = torch.eye(hidden) * identity
        self.weight = nn.Parameter(start)
        self.register_buffer("columns", columns(hidden, count, scale), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.columns)


def columns(hidden: int, count: int, scale: float) -> Tensor:
    return torch.cat([torch.ones(hidden), torch.full((hidden * count,), scale)])


class Head(nn.Module, ABC):
    """A head to train. The names of its parameters are those of the file."""

    embedding: Tensor
    method: str
    layers: tuple[int, ...] = ()  # whose states it reads besides the last one
    first = 1  # position t drafts token t + 1 + first at depth 0
    rate = 1e-3  # the peak learning rate that suits it

    def __init__(self, target: Target, kept: NDArray[Any], train_head: bool = False) -> None:
        super().__init__()
        self.head = Rows(target, kept, train_head)
        self.register_buffer("embedding", target.embedding, persistent=False)

    def loss(self, window: Window) -> Outcome:
        """The mean over depths of the mean cross-entropy of the target's distributions, in nats; a depth weighs DECAY times the one
        before."""
        return self.outcome([(state, window.distributions(self.first + depth)) for depth, state in enumerate(self.states(window))])

    def begin(self, windows: Iterable[Window]) -> None:
        """Before the first step: sets what needs no training, from windows of the texts."""
        return

    @abstractmethod
    def states(self, window: Window) -> list[Tensor]:
        """For each depth d what the trimmed head reads, [B, n, hidden], of the first n positions, at least T - 1 - first - d. Position t
        drafts token t + 1 + first + d from the text up to the token before."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What the file says besides the arrays: values that JSON can hold."""

    def outcome(self, depths: list[tuple[Tensor, Distributions]]) -> Outcome:
        total, weights, right = torch.zeros(()), 0.0, None
        hits, all_hits, counts = [], [], []
        for depth, (state, distributions) in enumerate(depths):
            chosen = Distributions(*(part[distributions.counts] for part in distributions))
            loss, hit = self.head.loss(state[:, : distributions.counts.shape[1]][distributions.counts], chosen)
            if len(hit):
                total, weights = total + DECAY**depth * loss / len(hit), weights + DECAY**depth
            found = torch.zeros_like(distributions.counts)
            found[distributions.counts] = hit
            right = found if right is None else right[:, : found.shape[1]] & found
            hits.append(found.sum())
            all_hits.append(right.sum())
            counts.append(distributions.counts.sum())
        return Outcome(total / (weights or 1), torch.stack(hits), torch.stack(all_hits), torch.stack(counts))

    def embedded(self, tokens: Tensor) -> Tensor:
        return self.embedding[tokens].float()

    def export(self) -> dict[str, NDArray[Any]]:
        """The arrays of the file: `kept` i32, ascending; `rows` if the trimmed head was trained; matrices in bfloat16, vectors in
        float32."""
        found = {"kept": self.head.kept.astype(np.int32)}
        for name, parameter, factor in self._stored():
            found[name] = to_numpy((parameter * factor).to(torch.bfloat16 if parameter.ndim > 1 else torch.float32))
        return found

    @torch.no_grad()
    def restore(self, arrays: Arrays) -> None:
        """Takes over what `export` gave. KeyError names an array that is missing."""
        for name, parameter, factor in self._stored():
            parameter.copy_(as_tensor(arrays[name]).float() / factor)

    def _stored(self) -> list[tuple[str, Tensor, Tensor | float]]:
        """Name in the file, parameter, and the factor of what is stored."""
        found: list[tuple[str, Tensor, Tensor | float]] = []
        for name, parameter in self.named_parameters():
            owner, _, last = name.rpartition(".")
            factor = getattr(self.get_submodule(owner), "columns", 1.0) if last == "weight" else 1.0
            found.append((name.removeprefix("head."), parameter, factor))
        return found
