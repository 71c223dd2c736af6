"""A trained judge lets drafted tokens pass that the target would not have drawn, if the text stays right. Not lossless.

Gregor Bachmann, Sotiris Anagnostidis, Albert Pumarola, Markos Georgopoulos, Artsiom Sanakoyeu, Yuming Du, Edgar Schönfeld, Ali Thabet,
Jonas Kohler: Judge Decoding: Faster Speculative Sampling Requires Going Beyond Model Alignment, 2025, arXiv 2501.19309.

1. Draw the target's token at each node that is reached. A child that has it is followed, as in plain decoding.
2. Otherwise a child passes if sigmoid(w.h + b) > t. h is the target's final state behind the child's token. Of several the best counts.
3. If none passes, stop: the target's token is the bonus token.

Differs: the labels of the judge come from the target itself, without annotation. A token that a processor of the request forbids never
passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.distribution import Distribution
from redraft.core.noise import Stream
from redraft.core.plan import Accepted
from redraft.core.taps import NO_TAPS, Taps
from redraft.core.tree import F64, Kind, TokenTree
from redraft.errors import CheckpointError, InvalidInput
from redraft.models.trained import Trained, model_hash, place
from redraft.options import Options, number
from redraft.verify.verifier import follow

if TYPE_CHECKING:
    from redraft.models.runner import Runner

METHOD = "judge"


@dataclass(frozen=True)
class Judge(Options):
    """t: the chance of being right that a token must exceed; 1: the text of plain decoding, 0: every draft passes, both without a file;
    path: the file or folder of the trained judge, None for its place among what is kept."""

    t: float = number(0.5, ge=0, le=1)
    path: Path | None = None

    card: ClassVar[Card] = Card(
        "Judge decoding",
        "Bachmann, Anagnostidis, Pumarola, Georgopoulos, Sanakoyeu, Du, Schönfeld, Thabet, Kohler, Judge Decoding: Faster Speculative "
        "Sampling Requires Going Beyond Model Alignment, 2025, arXiv 2501.19309",
        Guarantee.LOSSY,
        needs="a judge trained for the model: python -m redraft_train.judge",
        deviates="labels come from the target, without annotation",
        summary="Accepts what is right too; for strong drafts",
    )
    supports: ClassVar[frozenset[Kind]] = frozenset(Kind)
    drafts: ClassVar[Stream] = Stream.TARGET
    exact: ClassVar[bool] = False

    def accept(self, trees: Seq[TokenTree], distribution: Distribution) -> list[Accepted]:
        raise AssertionError("not opened")

    def open(self, runner: Runner) -> Judging:
        """InvalidInput if there is no file or it belongs to another model, CheckpointError if it is damaged."""
        last = len(runner.spec.layers) - 1
        if self.t in (0, 1):
            return Judging(runner, last, np.zeros(runner.spec.hidden), 0.0, math.inf if self.t else -math.inf)
        path = self.path.expanduser() if self.path else place(METHOD, model_hash(runner))
        if not path.exists():
            missing = f"no file {path}" if self.path else "no judge is kept for this model"
            raise InvalidInput(f"{METHOD}: {missing}; make one with: python -m redraft_train.judge MODEL --draft-model DRAFT")
        trained = Trained.load(path, METHOD)
        trained.check(runner, path)
        w, b = trained.arrays.get("w"), trained.about.get("b")
        if w is None or w.shape != (runner.spec.hidden,) or not isinstance(b, float):
            raise CheckpointError(f"{path}: not a complete file of {METHOD}: w of {runner.spec.hidden} numbers and b are needed")
        return Judging(runner, last, np.asarray(w, np.float64), b, math.log(self.t / (1 - self.t)))


@dataclass(frozen=True, eq=False)
class Judging:
    """The opened form. w: f64[hidden] and b: of the judge; border: the value of w.h + b that a token must exceed."""

    runner: Runner
    last: int
    w: F64
    b: float
    border: float

    supports: ClassVar[frozenset[Kind]] = Judge.supports
    drafts: ClassVar[Stream] = Judge.drafts
    exact: ClassVar[bool] = Judge.exact
    card: ClassVar[Card] = Judge.card

    @property
    def bytes(self) -> int:
        return int(self.w.nbytes)

    @property
    def taps(self) -> Taps:
        return NO_TAPS if math.isinf(self.border) else Taps(frozenset({self.last}))

    def accept(self, trees: Seq[TokenTree], distribution: Distribution) -> list[Accepted]:
        roots, scores = distribution.roots.tolist(), self._scores(trees, distribution)

        def tokens(reached: dict[int, int]) -> list[int]:
            rows = [roots[s] + 1 + node for s, node in reached.items()]
            drawn = distribution.draw(rows)  # 1. and 3.
            for i, (s, node) in enumerate(reached.items()):
                if trees[s].child(node, drawn[i]) < 0:
                    drawn[i] = self._passed(trees[s], node, scores.get(s), distribution, rows[i], drawn[i])
            return drawn

        return follow(trees, distribution, tokens)

    def _passed(self, tree: TokenTree, node: int, scores: F64 | None, distribution: Distribution, row: int, token: int) -> int:
        """The token of the best child that passes; `token` if none does."""
        if scores is None:
            return token
        fit = [child for child in dict.fromkeys(tree.drawn(node)) if scores[child] > self.border]
        for child in sorted(fit, key=lambda child: -scores[child]):  # 2.
            if distribution.allows(row, int(tree.tokens[child])):
                return int(tree.tokens[child])
        return token

    def _scores(self, trees: Seq[TokenTree], distribution: Distribution) -> dict[int, F64]:
        """Of each sequence with a draft: f64[nodes], w.h + b."""
        drafted = [s for s, root in enumerate(distribution.roots.tolist()) if root >= 0 and len(trees[s])]
        sizes = [len(trees[s]) for s in drafted]
        if not drafted or self.border == math.inf:
            return {}
        if self.border == -math.inf:
            return {s: np.zeros(size) for s, size in zip(drafted, sizes, strict=True)}
        rows = np.concatenate([distribution.roots[s] + 1 + np.arange(size) for s, size in zip(drafted, sizes, strict=True)])
        found = self.runner.normed(distribution.states(rows.tolist(), self.last)) @ self.w + self.b
        return dict(zip(drafted, np.split(found, np.cumsum(sizes)[:-1]), strict=True))
