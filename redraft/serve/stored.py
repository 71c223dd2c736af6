"""Responses kept in memory, so that clients can read them again and continue their conversations."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any, NamedTuple, cast

from redraft.serve.errors import Refused


class Turn(NamedTuple):
    """A response as it was sent, and the items that it answers. previous: id of the response before it in its conversation."""

    response: dict[str, Any]
    items: list[dict[str, Any]]
    previous: str | None


class Stored:
    """At most `count` responses of `size` bytes in all. Those unused for the longest time are dropped first. Each client's key
    sees its own responses only."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size, self.used = count, size, 0
        self._turns: OrderedDict[tuple[str, str], bytes] = OrderedDict()  # JSON, whose size is known; the last one was used last

    def __len__(self) -> int:
        return len(self._turns)

    def add(self, key: str, turn: Turn) -> None:
        data = json.dumps(turn).encode()
        self._turns[key, turn.response["id"]] = data
        self.used += len(data)
        while len(self._turns) > self.count or self.used > self.size:
            self.used -= len(self._turns.popitem(last=False)[1])

    def get(self, key: str, name: str, field: str = "response_id") -> Turn:
        """Refused (404) alike for ids that are unknown, dropped, or of another key."""
        if (data := self._turns.get((key, name))) is None:
            code = "previous_response_not_found" if field == "previous_response_id" else None
            raise Refused(404, f"no response {name!r} is stored here", field, code)
        self._turns.move_to_end((key, name))
        return Turn(*cast(list[Any], json.loads(data)))

    def drop(self, key: str, name: str) -> None:
        self.get(key, name)
        self.used -= len(self._turns.pop((key, name)))

    def conversation(self, key: str, name: str | None) -> list[dict[str, Any]]:
        """All items of the conversation that ends with this response. Refused (404) if one of its responses is no longer stored."""
        turns: list[Turn] = []
        while name is not None:
            turns.append(self.get(key, name, "previous_response_id"))
            name = turns[-1].previous
        return [item for turn in reversed(turns) for item in (*turn.items, *turn.response["output"])]
