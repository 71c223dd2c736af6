"""The cache policy of requests that choose none: named by the user, or the cheapest that loses little, as it was measured on this model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import expm1
from pathlib import Path
from typing import ClassVar, Protocol, cast

from redraft import registry
from redraft.engine.budgets import CACHE, Policy
from redraft.engine.curves import ENOUGH, Curve, Curves
from redraft.errors import InvalidInput
from redraft.models.trained import hash_of
from redraft.options import Options, number

FIELD = "CacheConfig.policy"  # as errors name it


class CachePolicy(Protocol):
    """What requests get that choose no keep, codec or read."""

    def params(self, tokens: int) -> dict[str, str]:
        """Fields of SamplingParams for a prompt of `tokens` tokens; empty for the whole cache."""
        ...

    @property
    def lengths(self) -> tuple[int, ...]:
        """The least tokens of a prompt from which on the choice is another one, ascending from 1."""
        ...

    def described(self, length: int) -> str:
        """What prompts get of at least this one of `lengths`."""
        ...


@dataclass(frozen=True)
class Named:
    """The same methods for every request."""

    policy: Policy

    def params(self, tokens: int) -> dict[str, str]:
        return dict(self.policy.parts)

    @property
    def lengths(self) -> tuple[int, ...]:
        return (1,)

    def described(self, length: int) -> str:
        return self.policy.text


@dataclass(frozen=True)
class Auto(Options):
    """quality: the largest accepted loss against the whole cache: of right answers in each task that the model can do, and of perplexity
    on running text, as parts of 1. The upper end of the 95 % interval counts."""

    quality: float = number(0.02, ge=0, lt=1)

    name: ClassVar[str] = __qualname__.lower()

    def open(self, curves: Curves) -> Chosen:
        """The measured policies within that loss that take less memory than the whole cache, those with the fewest bytes first."""
        found = [curve for curve in curves.curves if curve.bytes is not None and curve.bytes < 1 and loss(curve, curves) <= self.quality]
        return Chosen(curves, tuple(sorted(found, key=lambda curve: (curve.bytes, -(curve.speed or 0)))))


@dataclass(frozen=True)
class Chosen:
    """The best of `order` for the length of a prompt. A policy with a budget was measured on texts of curves.tokens tokens and serves
    prompts of at least that length; shorter ones get the best policy without a budget, else the whole cache."""

    curves: Curves
    order: tuple[Curve, ...]

    def params(self, tokens: int) -> dict[str, str]:
        found = self._best(tokens)
        return {} if found is None else found.params(tokens)

    @property
    def lengths(self) -> tuple[int, ...]:
        long = self.curves.tokens
        return (1,) if self._best(1) is self._best(long) else (1, long)

    def described(self, length: int) -> str:
        found = self._best(length)
        if found is None:
            return "the whole cache"
        lost = max(0.0, loss(found, self.curves))
        methods = "+".join(f"{seam}={text}" for seam, text in found.params(length).items())
        return f"{methods}: {found.bytes:.0%} of the bytes, loss up to {lost:.1%}"

    def _best(self, tokens: int) -> Curve | None:
        return next((curve for curve in self.order if curve.budget is None or tokens >= self.curves.tokens), None)


def loss(curve: Curve, curves: Curves) -> float:
    """The largest loss of a policy over all tasks; see Auto."""

    def by_task() -> Iterator[float]:
        for task, lost in curve.loss.items():
            if lost.right is None:
                yield expm1(lost.nats.high)
            elif curves.right[task] > curves.chance[task]:
                yield lost.right.high / curves.right[task]

    return max(by_task(), default=float("inf"))


def named(text: str) -> Named | Auto:
    """What a text names. InvalidInput or UnknownMethod, one line, if it names nothing."""
    if registry.parse(text)[0] == Auto.name:
        return cast(Auto, registry.build(Auto, text))
    policy = Policy.of(text)
    if other := dict(policy.parts).keys() - set(CACHE):
        raise InvalidInput(f"{FIELD} = {text!r}: {min(other)} is no method of the cache; {', '.join(CACHE)} are allowed")
    if policy.places:
        raise InvalidInput(f"{FIELD} = {text!r}: a number is needed in place of {{{min(policy.places)}}}")
    for seam, method in policy.parts:
        registry.create(seam, method)
    return Named(policy)


def of(text: str, model: str, source: Path, dtype: str, backend: str) -> CachePolicy:
    """The policy that a text names, for the checkpoint `source`, which the user calls `model`. InvalidInput if the measurements that it
    needs are missing, are of too few texts, or are those of another dtype or backend."""
    found = named(text)
    if isinstance(found, Named):
        return found
    curves = Curves.of(hash_of(source))
    if curves is None:
        raise InvalidInput(f"{FIELD} = {text!r}: nothing was measured on this model; `redraft bench cache {model} --save` does it")
    if (curves.dtype, curves.backend) != (dtype, backend):
        raise InvalidInput(
            f"{FIELD} = {text!r}: measured with dtype {curves.dtype} and backend {curves.backend}, this is {dtype} and {backend};"
            f" `redraft bench cache {model} --save` measures it"
        )
    if curves.texts < ENOUGH:
        raise InvalidInput(
            f"{FIELD} = {text!r}: measured on {curves.texts} texts a task, {ENOUGH} or more are needed;"
            f" `redraft bench cache {model} --save` measures more"
        )
    return found.open(curves)
