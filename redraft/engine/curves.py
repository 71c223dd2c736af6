"""What cache policies cost on one model, as `redraft bench cache --save` measured it and kept it for later choices."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from redraft import kept
from redraft.engine.budgets import Policy
from redraft.errors import CheckpointError, RedraftError

FOLDER = "cache-curves"
VERSION = 1
ENOUGH = 8  # texts of a task, with fewer its intervals are too narrow to be trusted


class Interval(NamedTuple):
    """A mean over texts and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def visible(self) -> bool:
        return self.low > 0 or self.high < 0


class Loss(NamedTuple):
    """What a policy loses on one task against the whole cache; less than 0 if it gains. nats: log-probability of a right token; right:
    part of the answers that are right, None for running text, which has no answers."""

    nats: Interval
    right: Interval | None = None


@dataclass(frozen=True)
class Curve:
    """A policy at one budget. policy: its text, with places for the budget; budget: percent of the text's tokens, None if it takes none;
    bytes: of the cache after a long text, relative to the whole cache; speed: tokens a second, likewise; both None if not measured;
    loss: by task."""

    policy: str
    budget: float | None
    bytes: float | None
    speed: float | None
    loss: Mapping[str, Loss]

    def params(self, tokens: int) -> dict[str, str]:
        """Fields of SamplingParams for a text of `tokens` tokens. UnknownMethod if a method is no longer registered."""
        return Policy.of(self.policy).at(self.budget or 100, tokens)


@dataclass(frozen=True)
class Curves:
    """model: the hash of the model; name: as the user gave it; dtype, backend: in which it ran; tokens: of the longest text; texts: of
    each task; right: by task, the part of right answers with the whole cache; chance: likewise, by guessing."""

    model: str
    name: str
    dtype: str
    backend: str
    tokens: int
    texts: int
    right: Mapping[str, float]
    chance: Mapping[str, float]
    curves: tuple[Curve, ...]

    def save(self, path: Path | None = None) -> Path:
        """Writes a JSON file, `place` if the user names none; returns its path. No reader ever sees a partial file."""
        path = path or place(self.model)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: Path) -> Curves:
        """Reads what `save` wrote. CheckpointError if it is no such file."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if (version := content.pop("version")) != VERSION:
                raise CheckpointError(
                    f"{path}: curves of version {version}, this one reads {VERSION}; measure again: redraft bench cache --save"
                )
            curves = tuple(
                Curve(**{**one, "loss": {task: _loss(*loss) for task, loss in one["loss"].items()}}) for one in content["curves"]
            )
            return cls(**{**content, "curves": curves})
        except RedraftError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: no curves of cache policies: {' '.join(str(error).split())}") from None

    @classmethod
    def of(cls, model: str) -> Curves | None:
        """Those that are kept for the model with this hash; None if it was not measured."""
        path = place(model)
        return cls.load(path) if path.exists() else None


def _loss(nats: Any, right: Any) -> Loss:
    return Loss(Interval(*nats), None if right is None else Interval(*right))


def place(model: str) -> Path:
    """Where the curves of a model are kept if the user names no other place; see `kept`."""
    return kept.folder(FOLDER) / f"{model}.json"
