"""Reads the pages with the highest possible scores, bounded by the least and largest value of each channel in every part of a page.

Shang Yang, Junxian Guo, Haotian Tang, Qinghao Hu, Guangxuan Xiao, Jiaming Tang, Yujun Lin, Zhijian Liu, Yao Lu, Song Han:
LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention, 2025, arXiv 2502.14866 (its retrieval heads), after
Jiaming Tang, Yilong Zhao, Kan Zhu, Guangxuan Xiao, Baris Kasikci, Song Han: Quest: Query-Aware Sparsity for Efficient
Long-Context LLM Inference, 2024, arXiv 2406.10774.

1. For every `logical` tokens of a full page, keep the least and the largest value of each channel of the keys.
2. The bound of a query q on such a part is the sum over channels of the larger of q * least and q * largest. It is at least q times
   any key of the part.
3. The score of a page is the largest bound over its parts and over the query heads that share its keys.
4. Read the pages with the largest scores, the first pages of the text, and always the newest page.

Differs: no streaming heads; pages of 32 tokens, parts of 16; the choice is made for each row and never reused; the first `sinks` pages
are always read, within the budget; bounds are those of the stored keys, in the dtype of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.errors import InvalidInput
from redraft.kv.sparse_attention.sparse_attention import StatelessRead
from redraft.ops.arrays import Tensor, namespace
from redraft.ops.format import PAGE, Array, Arrays
from redraft.options import Options, number

if TYPE_CHECKING:
    from redraft.ops.backend import Products


@dataclass(frozen=True)
class PageTopK(Options, StatelessRead):
    """tokens: the most tokens that a row reads, with the newest page counted as full; logical: the tokens in a part of a page; sinks:
    the number of first pages that are always read. A page that a window or an eviction has cut is read in addition.

    Measured on two code files of 992 tokens with the embedded model and tokens=256. The rows from 600 on read this share of their full
    attention: 0.86 and 0.87 with parts of 8 tokens, 0.85 and 0.86 with 16, 0.84 and 0.86 with 32; 0.01 more without the sink page.
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
        budget="tokens={paged}",
    )
    sync_every: ClassVar[int] = PAGE

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
    def dense_up_to(self) -> int:
        return self.tokens

    def arrays(self, head_dim: int, dtype: Any) -> dict[str, Array]:
        bounds = Array((PAGE // self.logical, head_dim), dtype, whole=True)
        return {"low": bounds, "high": bounds}

    def fill(self, index: int, keys: Tensor) -> dict[str, Tensor]:
        """Nothing, because the bounds of a part are known only when its page is full."""
        return {}

    def summarize(self, keys: Tensor) -> dict[str, Tensor]:
        xp, parts = namespace(keys), keys.reshape(len(keys), -1, self.logical, keys.shape[-1])  # 1.
        return {"low": xp.min(parts, axis=2), "high": xp.max(parts, axis=2)}

    def bounds(self, q: Tensor, held: Arrays, products: Products) -> Tensor:
        """[K, G, R, n / logical]: upper bounds of q [K, G, R, D] times any key in each part of a page, in float32 or better."""
        heads, group, count, size = q.shape
        xp, rows = namespace(q), q.reshape(heads, -1, size)
        low, high = (held[name].reshape(heads, -1, size) for name in ("low", "high"))
        zero = xp.zeros_like(rows)
        above, below = xp.where(rows < 0, zero, rows), xp.where(rows > 0, zero, rows)
        found: Tensor = products(above, high) + products(below, low)  # 2.
        return found.reshape(heads, group, count, -1)

    def select(self, index: int, q: Tensor, held: Arrays, seen: Tensor, where: Tensor, at: Tensor, products: Products) -> Tensor:
        """[K, 1, R, n]. It chooses among the pages of which the row sees every slot, all older than the page of the row itself. In every
        step their bounds are known and they hold no tentative slot. All other visible slots are read."""
        xp, (heads, rows, slots) = namespace(q), seen.shape
        newest = (at // PAGE * PAGE)[:, None]
        old = xp.all((seen & (where[:, None] < newest)).reshape(heads, rows, -1, PAGE), axis=-1)  # [K, R, n / 32]
        scores = xp.max(self.bounds(q, held, products).reshape(heads, -1, rows, slots // PAGE, PAGE // self.logical), axis=(1, 4))  # 3.
        first = xp.all((where < PAGE * self.sinks).reshape(heads, -1, PAGE), axis=-1)  # by position: a lane may start later in the text
        scores = xp.where(old, xp.where(first[:, None], inf, scores), -inf)
        place = xp.argsort(xp.argsort(scores, axis=-1, descending=True, stable=True), axis=-1)  # of a page; lower pages first
        read = xp.repeat(~old | (place < self.tokens // PAGE - 1), PAGE, axis=-1)  # 4.
        found: Tensor = (seen & read)[:, None]
        return found
