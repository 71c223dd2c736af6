"""Reads the pages whose keys may fit the query best, by the least and largest value of each channel in every part of a page.

Shang Yang, Junxian Guo, Haotian Tang, Qinghao Hu, Guangxuan Xiao, Jiaming Tang, Yujun Lin, Zhijian Liu, Yao Lu, Song Han:
LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention, 2025, arXiv 2502.14866 (its retrieval heads), after
Jiaming Tang, Yilong Zhao, Kan Zhu, Guangxuan Xiao, Baris Kasikci, Song Han: Quest: Query-Aware Sparsity for Efficient
Long-Context LLM Inference, 2024, arXiv 2406.10774.

1. Full page: keep the least and the largest value of each channel of its keys, for every `logical` tokens.
2. The best that a query q can meet in such a part: the sum over channels of the larger of q * least and q * largest, no less
   than q times any of its keys.
3. A page scores as the best of its parts, under the best of the query heads that share its keys.
4. Read the pages with the largest scores, the first pages of the text and always the newest one.

Differs: no head streams; pages are of 32 tokens, parts of 16; the choice is made for each row and never reused; the first `sinks` pages
are always read, within the budget; bounds are of keys as they are stored, in the dtype of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.errors import InvalidInput
from redraft.ops.format import PAGE, Array, Arrays
from redraft.options import Options, number

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from redraft.ops.backend import Products


@dataclass(frozen=True)
class PageTopK(Options):
    """tokens: that a row reads at most, the newest page counted as a full one; logical: tokens of a part of a page; sinks: how
    many of the first pages are always read. A page that a window or an eviction has cut is read on top.

    On two files of code of 992 tokens, with the embedded model and tokens=256, the rows from 600 on read this share of their
    attention: parts of 8 tokens 0.86 and 0.87, of 16 0.85 and 0.86, of 32 0.84 and 0.86; without the sink page 0.01 more.
    """

    tokens: int = 1024
    logical: int = 16
    sinks: int = number(1, ge=0)

    card: ClassVar[Card] = Card(
        "Page top-k by bounds of the keys",
        "Yang, Guo, Tang, Hu, Xiao, Tang, Lin, Liu, Lu, Han, LServe: Efficient Long-sequence LLM Serving with Unified Sparse "
        "Attention, 2025, arXiv 2502.14866; Tang, Zhao, Zhu, Xiao, Kasikci, Han, Quest: Query-Aware Sparsity for Efficient "
        "Long-Context LLM Inference, 2024, arXiv 2406.10774",
        Guarantee.LOSSY,
        deviates="no streaming heads; pages of 32 tokens; a choice for every row, never reused; the first page is always read",
        summary="Reads the pages that fit best; long contexts, no set-up",
    )
    grid: ClassVar[int] = PAGE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.logical < 1 or PAGE % self.logical:
            raise InvalidInput(f"page-top-k:logical={self.logical}: must be 1 or more and divide {PAGE}")
        least = (self.sinks + 2) * PAGE
        if self.tokens % PAGE or self.tokens < least:
            raise InvalidInput(
                f"page-top-k:tokens={self.tokens}: must be a multiple of {PAGE} and {least} or more, room for the first {self.sinks} pages,"
                " the newest and one to choose"
            )

    def open(self, runner: Any) -> PageTopK:
        return self

    @property
    def name(self) -> str:
        return f"page-top-k-{self.logical}"

    @property
    def least(self) -> int:
        return self.tokens

    def arrays(self, head_dim: int, dtype: torch.dtype) -> dict[str, Array]:
        bounds = Array((PAGE // self.logical, head_dim), dtype, whole=True)
        return {"low": bounds, "high": bounds}

    def fill(self, index: int, keys: Tensor) -> dict[str, Tensor]:
        """Nothing: a part's bounds are known when its page is full."""
        return {}

    def fold(self, keys: Tensor) -> dict[str, Tensor]:
        parts = keys.unflatten(1, (-1, self.logical))  # 1.
        return {"low": parts.amin(2), "high": parts.amax(2)}

    def bounds(self, q: Tensor, held: Arrays, products: Products) -> Tensor:
        """The most that q [K, G, R, D] times a key can be in each part of a page: [K, G, R, n / logical], in float32 or better."""
        low, high = (held[name].flatten(1, 2) for name in ("low", "high"))
        rows = q.flatten(1, 2)
        found: Tensor = products(rows.clamp(min=0), high) + products(rows.clamp(max=0), low)  # 2.
        bounds: Tensor = found.unflatten(1, q.shape[1:3])
        return bounds

    def select(self, index: int, q: Tensor, held: Arrays, seen: Tensor, where: Tensor, at: Tensor, products: Products) -> Tensor:
        """[K, 1, R, n]. Chosen among are pages of which a row sees every slot, all of them older than the row's own page of the text:
        whatever the step, their bounds are known and no tentative slot is in them. What else a row sees is read."""
        import torch

        newest = (at // PAGE * PAGE)[:, None]
        old: Tensor = (seen & (where[:, None] < newest)).unflatten(2, (-1, PAGE)).all(-1)  # [K, R, n / 32]
        scores = self.bounds(q, held, products).unflatten(3, (-1, PAGE // self.logical)).amax((1, 4))  # 3.
        first = (where < PAGE * self.sinks).unflatten(1, (-1, PAGE)).all(-1)  # of the text: a lane may begin later
        scores = scores.masked_fill(first[:, None], inf)
        order = scores.masked_fill(~old, -inf).sort(dim=-1, descending=True, stable=True).indices  # lower pages first
        best = order[..., : self.tokens // PAGE - 1]  # 4.
        read = torch.scatter(~old, -1, best, True)
        return (seen & read.repeat_interleave(PAGE, -1))[:, None]
