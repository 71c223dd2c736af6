"""Keeps the cache of all unedited parts of a text. The keys of text that moved are rotated to their new positions.

Zhenyu He, Jun Zhang, Shengjie Luo, Jingjing Xu, Zhi Zhang, Di He: Let the Code LLM Edit Itself When You Edit the Code, 2024,
arXiv 2407.03157.

1. Find the runs of tokens that are equal in the old and the new text, after their common prefix.
2. Reuse the text before the first edit unchanged. This is exact.
3. Reuse the runs after an edit too: values unchanged, keys rotated by the number of positions that the run moved.
4. Compute the tokens between the runs, each with all text before it as context, and the last `refresh` tokens.

Differs: runs shorter than `shortest` are computed, because each run costs a step; only full pages of the old text are cached, so up
to 31 of its last tokens are computed too.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, ClassVar, Self

from redraft.card import Card, Guarantee
from redraft.core.sequence import Request
from redraft.kv.reuse.blend import fit
from redraft.kv.reuse.reuse import AtOnce, Repair, Span, Spliced
from redraft.options import Options, number


@dataclass(frozen=True)
class PIE(AtOnce, Options):
    """refresh: the last tokens are always computed, this many; shortest: runs with fewer tokens are computed."""

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

    needs: ClassVar[str] = "before"

    def open(self, runner: Any) -> Self:
        fit("pie", runner)
        return self

    def texts(self, request: Request) -> list[list[int]]:
        return []

    def repair(self, text: Spliced) -> Repair:
        yield from ()

    def spans(self, request: Request, stored: int, cached: Callable[[Seq[int]], int]) -> list[Span]:
        # 1.
        new, old = request.prompt, request.before[: cached(request.before)]
        end = len(new) - self.refresh  # 4.
        same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        found = [Span(stored, stored, same - stored, True, old)]  # 2.
        for first, at, count in SequenceMatcher(None, old[same:], new[same:], autojunk=False).get_matching_blocks():
            found.append(Span(same + at, same + first, count, False, old))  # 3.
        cut = [span._replace(length=min(span.length, end - span.at)) for span in found]
        return [span for span in cut if span.length >= self.shortest]
