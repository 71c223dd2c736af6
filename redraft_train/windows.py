"""Windows of texts for training: texts one behind the other in a random order, cut into rows of equal length."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from redraft_train.heads.head import Window

if TYPE_CHECKING:
    from redraft_train.states import States


class Windows:
    """Windows [batch, length] over some texts. prompts: whether distributions within prompts count too, besides those of what the model
    wrote; lead: how many tokens before the first one that it wrote are there, None for all."""

    def __init__(
        self,
        states: States,
        texts: Seq[int],
        batch: int,
        length: int,
        *,
        layers: Seq[int] = (),
        prompts: bool = False,
        lead: int | None = None,
    ) -> None:
        self.states, self.texts, self.batch, self.length = states, list(texts), batch, length
        self.layers, self.prompts = tuple(layers), prompts
        self.begin = {text: self._begin(text, lead) for text in self.texts}

    def epoch(self, seed: int) -> Iterator[Window]:
        """All texts once, in an order that `seed` gives. The last window may have fewer rows, filled up with nothing."""
        places, names = self._stream(np.random.default_rng(seed).permutation(self.texts))
        rows = -(-len(places) // self.length)
        size = -(-rows // self.batch) * self.batch * self.length
        places, names = np.pad(places, (0, size - len(places))), np.pad(names, (0, size - len(names)), constant_values=-1)
        for at in range(0, rows, self.batch):
            part = slice(at * self.length, min(rows, at + self.batch) * self.length)
            yield self._window(places[part].reshape(-1, self.length), names[part].reshape(-1, self.length))

    def _stream(self, texts: Seq[int] | NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        places = [np.arange(self.begin[int(text)], self.states.starts[text + 1]) for text in texts]
        return np.concatenate(places), np.repeat(np.asarray(texts, np.int64), [len(one) for one in places])

    def _begin(self, text: int, lead: int | None) -> int:
        """The first place of a text that is in windows."""
        first, last = map(int, self.states.starts[text : text + 2])
        if lead is None:
            return first
        (written,) = np.nonzero(self.states.answer[first:last])
        return max(first, first + int(written[0]) - lead) if len(written) else first

    def _window(self, places: NDArray[np.int64], names: NDArray[np.int64]) -> Window:
        states = self.states
        after = np.minimum(places + 1, len(states.tokens) - 1)
        mask = np.ones(places.shape, bool) if self.prompts else states.answer[after]
        return Window(
            tokens=torch.from_numpy(states.tokens[places].astype(np.int64)),
            text=torch.from_numpy(names),
            positions=torch.from_numpy(places - states.starts[np.maximum(names, 0)]),
            state=_bfloat16(states.final[places]),
            top_ids=torch.from_numpy(states.top_ids[places].astype(np.int64)),
            top_logits=torch.from_numpy(states.top_logits[places]),
            log_sum=torch.from_numpy(states.log_sum[places]),
            mask=torch.from_numpy(mask),
            layers={layer: _bfloat16(states.layers[layer][places]) for layer in self.layers},
        )


def _bfloat16(bits: NDArray[np.uint16]) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
