"""The probability that an offered token is the next one, from the evidence of all drafters that were asked: a logistic regression.

Every feature is present or absent: the bucket of each drafter that offers the token, which drafters offer anything at the place and which
of them offer this token, and the depth. The weights start from a prior that was fitted on texts of several models (prior.json) and are
corrected by every place on the accepted path, whether its offers were drafted or not, so nothing has to be explored.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence as Seq
from functools import cache
from importlib import resources
from math import exp, sqrt
from typing import Any

from redraft.draft.source import Source

DEPTHS = 8  # depths with a weight of their own; deeper nodes have that of the last
TRUST = 60  # texts' worth of trust in the prior: places after which a weight moves as slowly as the prior's
MOST = 1000  # times that are counted
RATES = [max(0.02, 0.5 / sqrt(1 + n)) for n in range(MOST + 1)]  # step of a weight that was present n times
SURE = 0.01  # errors below this teach nothing


@cache
def _prior() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((resources.files("redraft.draft") / "prior.json").read_text(encoding="utf-8"))
    return found


Candidate = tuple[int, float, list[int], int]
"""A token, its probability if its parent is right, its features without that of its depth, and the drafters that offer it, as bits."""


class Acceptance:
    """The weights. names, sources: the drafters. Feature numbers: first depths, then pairs of sets of drafters, then buckets."""

    def __init__(self, names: Seq[str], sources: Seq[Source], prior: dict[str, Any] | None = None) -> None:
        prior = _prior() if prior is None else prior
        self.names = list(names)
        self.sets = 1 << len(names)
        weights: list[float] = [*prior.get("depth", [0.0] * DEPTHS)]
        pairs, buckets = prior.get("sets", {}), prior.get("buckets", {})
        words = [" ".join(name for i, name in enumerate(names) if number >> i & 1) for number in range(self.sets)]
        less = [" ".join(name for i, name in enumerate(names) if number >> i & 1 and name in buckets) for number in range(self.sets)]
        exact = [pairs.get(f"{asked}|{agreed}") for asked in words for agreed in words]
        without = [pairs.get(f"{asked}|{agreed}", 0.0) for asked in less for agreed in less]  # the drafters that the prior does not know
        weights += [other if weight is None else weight for weight, other in zip(exact, without, strict=True)]
        self.first: list[int] = []  # feature of bucket 0 of each drafter
        for name, source in zip(names, sources, strict=True):
            self.first.append(len(weights))
            known = buckets.get(name, ())
            weights += known if len(known) == source.buckets else getattr(source, "prior", [0.0] * source.buckets)
        self.weights = array("d", weights)
        self.counts = array("i", [TRUST if weight else 0 for weight in weights])
        for i, weight in enumerate(exact):
            if weight is None:
                self.counts[DEPTHS + i] = 0

    def candidates(self, depth: int, asked: int, merged: dict[int, list[int]], mood: float = 0.0) -> list[Candidate]:
        """The probabilities of all tokens that were offered at one place. depth: from 1; asked: the drafters that offer anything there, bit
        i for drafter i; merged: token -> the drafters that offer it, as bits, and then their features."""
        weights, pairs = self.weights, DEPTHS + asked * self.sets
        start = mood + weights[(depth if depth < DEPTHS else DEPTHS) - 1]
        found = []
        for token, features in merged.items():
            agreed = features[0]
            features[0] = pairs + agreed
            total = start
            for feature in features:
                total += weights[feature]
            found.append((token, 1 / (1 + exp(-total)) if total > -30 else 0.0, features, agreed))
        return found

    def learn(self, depth: int, candidates: Seq[Candidate], token: int) -> float:
        """One step of gradient descent for each candidate: `token` came. Returns how many more came than expected."""
        weights, counts = self.weights, self.counts
        total = 0.0
        common = (depth if depth < DEPTHS else DEPTHS) - 1
        for other, chance, features, _ in candidates:
            error = (other == token) - chance
            total += error
            if -SURE < error < SURE:
                continue
            for feature in (common, *features):
                count = counts[feature]
                weights[feature] += error * RATES[count]
                if count < MOST:
                    counts[feature] = count + 1
        return total

    def dump(self) -> dict[str, Any]:
        """The weights as a prior for later."""
        words = [" ".join(name for i, name in enumerate(self.names) if number >> i & 1) for number in range(self.sets)]
        pairs = {
            f"{asked}|{agreed}": round(weight, 3)
            for i, asked in enumerate(words)
            for j, agreed in enumerate(words)
            if (weight := self.weights[DEPTHS + i * self.sets + j])
        }
        ends = [*self.first[1:], len(self.weights)]
        buckets = {name: [round(w, 3) for w in self.weights[a:b]] for name, a, b in zip(self.names, self.first, ends, strict=True)}
        return {"depth": [round(w, 3) for w in self.weights[:DEPTHS]], "sets": pairs, "buckets": buckets}

    def snapshot(self) -> tuple[list[float], list[int]]:
        return list(self.weights), list(self.counts)

    def restore(self, snapshot: tuple[list[float], list[int]]) -> None:
        self.weights[:], self.counts[:] = array("d", snapshot[0]), array("i", snapshot[1])
