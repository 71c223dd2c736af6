"""An edited text keeps the cache of all that was not edited: what moved gets its keys turned to the new positions.

Zhenyu He, Jun Zhang, Shengjie Luo, Jingjing Xu, Zhi Zhang, Di He: Let the Code LLM Edit Itself When You Edit the Code, 2024,
arXiv 2407.03157.

1. The edit in tokens: equal runs of the old and the new text, found behind their common beginning.
2. What stands before the first edit is taken over as it is; that is exact.
3. What stands behind an edit is taken over too: values as they are, keys turned by the number of positions that it moved.
4. The tokens between are computed, each with all that stands before it, and so are the last `refresh` tokens.

Differs: runs shorter than `shortest` are computed, since a run of its own costs a step; the cache is that of full pages, so
that up to 31 of the old text's last tokens are computed too.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, ClassVar, Self

from redraft.card import Card, Guarantee
from redraft.errors import Unsupported
from redraft.kv.reuse.reuse import Span
from redraft.options import Options, number


@dataclass(frozen=True)
class PIE(Options):
    """refresh: last tokens that are computed in any case; shortest: runs with fewer tokens are computed."""

    refresh: int = number(1, ge=1)
    shortest: int = number(16, ge=1)

    card: ClassVar[Card] = Card(
        "Positional integrity encoding",
        "He, Zhang, Luo, Xu, Zhang, He, Let the Code LLM Edit Itself When You Edit the Code, 2024, arXiv 2407.03157",
        Guarantee.LOSSY,
        needs="a model with rotary positions",
        deviates="short runs are computed; only full pages of the old text are taken over",
        summary="Keeps the cache of unedited text; for editors",
    )

    def open(self, runner: Any) -> Self:
        if any(layer.rotary is None for layer in runner.spec.attention):
            raise Unsupported(f"pie: {runner.spec.family} has no rotary positions, so keys cannot be turned to new ones")
        return self

    def spans(self, old: Seq[int], new: Seq[int], stored: int) -> list[Span]:
        # 1.
        end = len(new) - self.refresh  # 4.
        same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        found = [Span(stored, stored, same - stored, True)]  # 2.
        for first, at, count in SequenceMatcher(None, old[same:], new[same:], autojunk=False).get_matching_blocks():
            found.append(Span(same + at, same + first, count, False))  # 3.
        cut = [span._replace(length=min(span.length, end - span.at)) for span in found]
        return [span for span in cut if span.length >= self.shortest]
