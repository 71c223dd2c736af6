"""Prefixes that the requests of a batch share stay in the cache until the last of these requests has ended."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from redraft.core.sequence import Group, Request, Sequence
from redraft.kv.memory import Memories
from redraft.kv.paged import Paged
from redraft.models.runner import Runner


def held(memory: Paged | Memories, request: Request, tokens: Seq[int]) -> Sequence:
    """An open sequence that lists the blocks of the beginning of a text, as far as they are in the cache of this request's tenant."""
    holder = Sequence.holder(request, [*tokens, 0])  # a match always leaves one token to run, so one is added
    memory.open(holder)
    memory.attach(holder, memory.match(holder.tokens, request.salt))
    return holder


class Holds:
    """The prefixes that are held now. An open sequence lists the pages of each, so that nobody evicts them."""

    def __init__(self, runner: Runner) -> None:
        self.memory = runner.memory
        self._held: dict[Group, Sequence] = {}

    def __len__(self) -> int:
        return len(self._held)

    def keep(self, seq: Sequence) -> None:
        """Holds the prefix of the sequence's group once it is published. Takes no memory: the sequence lists the same pages."""
        group, salt = seq.request.group, seq.request.salt
        if group is None or not group.held or group in self._held or seq.stored < len(group.prefix):
            return
        tokens = [*group.prefix, 0]  # as for a holder
        if self.memory.match(tokens, salt) == len(group.prefix) and not self.memory.idle_matched(tokens, salt):
            self._held[group] = held(self.memory, seq.request, group.prefix)

    def leave(self, seq: Sequence, others: Iterable[Sequence]) -> None:
        """After the sequence left: lets the prefix of its group go if none of the others is of this group."""
        group = seq.request.group
        if group in self._held and all(other.request.group is not group for other in others):
            self.memory.free(self._held.pop(group))

    def release(self) -> None:
        """Lets all prefixes go, for good. They stay in the prefix cache until their pages are needed."""
        while self._held:
            group, holder = self._held.popitem()
            group.held = False
            self.memory.free(holder)
