"""Methods that requests chose. Each is opened once and shared, however its options are spelled.

Their number and their memory are bounded. The least recently used method is closed first. A method that a live text uses is not closed.
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
    """in_use: the opened methods of live texts. An opened method with memory of its own has an attribute `bytes`."""

    def __init__(self, in_use: Callable[[], Iterable[Any]] = tuple, *, max_count: int = MAX_COUNT, max_bytes: int = MAX_BYTES) -> None:
        self.in_use, self.max_count, self.max_bytes = in_use, max_count, max_bytes
        self._found: OrderedDict[Hashable, Any] = OrderedDict()

    @property
    def count(self) -> int:
        return len(self._found)

    @property
    def bytes(self) -> int:
        """Memory of the opened methods now."""
        return sum(getattr(one, "bytes", 0) for one in list(self._found.values()))

    def get(self, name: str, key: Hashable, make: Callable[[], T], needs: int = 0) -> T:
        """The method for `key`, made at its first use. needs: the most bytes it may need, as far as known; name: for errors.
        InvalidInput if it never fits; OutOfMemory if it does not fit beside the methods in use."""
        if key not in self._found:
            if needs > self.max_bytes:
                raise self._too_large(name, needs)
            self._close(1, needs)
            if self.bytes + needs > self.max_bytes:
                held = f"methods in use hold {size(self.bytes)} of {size(self.max_bytes)}"
                raise OutOfMemory(f"{name}: may need {size(needs)}, and {held}; try again later")
            made = make()
            if (amount := getattr(made, "bytes", 0)) > self.max_bytes:
                raise self._too_large(name, amount)
            self._found[key] = made
        found = self._found[key]
        self._found.move_to_end(key)
        self._close(0, 0, found)
        return cast(T, found)

    def _too_large(self, name: str, needs: int) -> InvalidInput:
        return InvalidInput(f"{name}: may need {size(needs)}; the limit for methods that requests choose is {size(self.max_bytes)}")

    def _close(self, count: int, needs: int, *wanted: Any) -> None:
        """Closes unused methods until `count` more with `needs` bytes fit, or none is left to close."""
        if self._fits(count, needs):
            return
        used = {id(one) for one in (*self.in_use(), *wanted)}
        for key in [key for key, one in self._found.items() if id(one) not in used]:
            del self._found[key]
            if self._fits(count, needs):
                return

    def _fits(self, count: int, needs: int) -> bool:
        return self.count + count <= self.max_count and self.bytes + needs <= self.max_bytes
