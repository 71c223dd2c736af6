"""Methods that requests chose, opened once and shared: one entry for each choice, however it is spelled.

Bounded in number and in memory. The method unused longest is closed first; a method that a live text uses is never closed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar, cast

from redraft.errors import InvalidInput, OutOfMemory
from redraft.models.memory import size

T = TypeVar("T")
MAX_COUNT = 64
MAX_BYTES = 256 << 20


class Opened:
    """in_use: the opened methods of live texts. An opened method has `bytes` where it holds memory of its own."""

    def __init__(self, in_use: Callable[[], Iterable[Any]] = tuple, *, max_count: int = MAX_COUNT, max_bytes: int = MAX_BYTES) -> None:
        self.in_use, self.max_count, self.max_bytes = in_use, max_count, max_bytes
        self._found: OrderedDict[Hashable, Any] = OrderedDict()

    @property
    def count(self) -> int:
        return len(self._found)

    @property
    def bytes(self) -> int:
        """What the opened methods hold now."""
        return sum(getattr(one, "bytes", 0) for one in list(self._found.values()))

    def get(self, name: str, key: Hashable, make: Callable[[], T], needs: int = 0) -> T:
        """What `key` stands for, made at its first use. needs: bytes that it may come to hold, as far as known; name: for errors.
        InvalidInput where it never fits; OutOfMemory where it does not beside those of live texts."""
        if key not in self._found:
            if needs > self.max_bytes:
                raise self._too_large(name, needs)
            self._close(1, needs)
            if self.bytes + needs > self.max_bytes:
                held = f"those in use hold {size(self.bytes)} of {size(self.max_bytes)}"
                raise OutOfMemory(f"{name}: may hold {size(needs)}, and {held}; try again later")
            made = make()
            if (amount := getattr(made, "bytes", 0)) > self.max_bytes:
                raise self._too_large(name, amount)
            self._found[key] = made
        found = self._found[key]
        self._found.move_to_end(key)
        self._close(0, 0, found)
        return cast(T, found)

    def _too_large(self, name: str, needs: int) -> InvalidInput:
        return InvalidInput(f"{name}: may hold {size(needs)}, and all methods that requests choose may hold {size(self.max_bytes)}")

    def _close(self, count: int, needs: int, *wanted: Any) -> None:
        """Closes methods until `count` more with `needs` bytes fit, as far as there are some that are not in use."""
        if self._fits(count, needs):
            return
        used = {id(one) for one in (*self.in_use(), *wanted)}
        for key in [key for key, one in self._found.items() if id(one) not in used]:
            del self._found[key]
            if self._fits(count, needs):
                return

    def _fits(self, count: int, needs: int) -> bool:
        return self.count + count <= self.max_count and self.bytes + needs <= self.max_bytes
