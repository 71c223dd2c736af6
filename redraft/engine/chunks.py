"""Texts that are computed for the cache, or read from disk, before a request that will reuse them runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

from redraft.config import SamplingParams
from redraft.core.sequence import Request, Sequence
from redraft.kv.memory import Memories
from redraft.kv.paged import Paged
from redraft.kv.reuse.chunks import FILLER

ONE = SamplingParams(temperature=0, max_tokens=1, draft_rows=0, seed=0)  # the token is thrown away


class ChunkTexts:
    """Which requests wait for which texts. A text that several requests lack is computed once."""

    def __init__(self, memory: Paged | Memories, longest: int, on_disk: Callable[[Seq[int], str], int]) -> None:
        """longest: tokens of a prompt, at most; on_disk: see Arrivals."""
        self.memory, self.longest, self.on_disk = memory, longest, on_disk
        self._texts: dict[tuple[str, tuple[int, ...]], Request] = {}  # those under way
        self._lacking: dict[str, set[str]] = {}  # id of a request -> ids of the texts that it waits for

    def lacking(self, request: Request) -> list[Request]:
        """The texts that must be computed, in order, before an admitted request can reuse them, without those that are under way. All
        wait for the first of them, which publishes their common beginning."""
        found: list[Request] = []
        adapter = request.adapter
        salt = request.salt if adapter is None else request.salt.removeprefix(adapter.salted(""))  # as it was before admission
        for text in self._texts_of(request):
            prompt = [*text, FILLER]  # all but the last token of a prompt can be found again
            if len(prompt) > self.longest or self.memory.match(prompt, request.salt) == len(text):
                continue
            key = request.salt, tuple(text)
            if key not in self._texts:
                name = f"{request.id}\0{len(found)}"  # no request of a caller has such an id
                self._texts[key] = Request(name, prompt, ONE, salt, adapter=adapter, priority=request.priority, hidden=True)
                found.append(self._texts[key])
            self._lacking.setdefault(request.id, set()).add(self._texts[key].id)
        self._lacking |= {text.id: {found[0].id} for text in found[1:]}
        return found

    def _texts_of(self, request: Request) -> list[list[int]]:
        """Those that the method needs; of the text before an edit what is on disk, because the rest may be as long as the new text."""
        if (reuse := request.sequences[0].cache.reuse) is None:
            return []
        count = self.on_disk([*request.before, FILLER], request.salt) if request.before else 0
        return [*reuse.texts(request), *([request.before[:count]] if count else [])]

    def ready(self, waiting: Iterable[Sequence]) -> list[Sequence]:
        """Those that wait for no text."""
        return [seq for seq in waiting if seq.request.id not in self._lacking] if self._lacking else list(waiting)

    def ended(self, request: Request) -> list[str]:
        """A request that left: those that wait for it go on, and it waits for nothing. Returns the ids of texts that nobody needs now."""
        waited = self._lacking.pop(request.id, set())
        if request.hidden:
            self._texts = {key: text for key, text in self._texts.items() if text is not request}
            for texts in self._lacking.values():
                texts.discard(request.id)
            self._lacking = {name: texts for name, texts in self._lacking.items() if texts}
            return []
        needed = {text for name, texts in self._lacking.items() if name not in waited for text in texts}
        return sorted(waited - needed)
