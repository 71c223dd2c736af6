"""The controls of a request (sample/controls/control.py), each at its stage."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any, ClassVar, Self

from redraft.config import SamplingParams
from redraft.core.sequence import Sequence
from redraft.errors import RedraftError, shown
from redraft.sample.controls.control import OpenControl, OpenedControls, Stage, controls
from redraft.sample.processors.processor import LazyCheck, Row, TextError, Vocabulary


@contextmanager
def failing(seq: Sequence) -> Iterator[None]:
    """Ends the request of a control that raises, and no other."""
    try:
        yield
    except RedraftError:
        raise
    except Exception as error:
        raise TextError(seq, f"control: it raised {type(error).__name__}: {shown(error)}") from error


class Controls:
    """Those of one stage. They begin with the first row."""

    stage: ClassVar[Stage]

    def __init__(self, opened: Seq[OpenControl]) -> None:
        self.opened = opened
        self._running: list[Any] | None = None

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        if params.control is None:
            return None
        kept = vocabulary.shared(OpenedControls)
        opened = [one for one in map(kept.get, controls(params.control)) if one.stage is cls.stage]
        return cls(opened) if opened else None

    def apply(self, row: Row) -> None:
        for one in self.running(row.seq):
            with failing(row.seq):
                one.apply(row)

    def running(self, seq: Sequence) -> list[Any]:
        if self._running is None:
            with failing(seq):
                self._running = [one.begin(seq) for one in self.opened]
        return self._running


class LogitControls(Controls):
    stage = Stage.LOGITS
    by_id: ClassVar[bool] = True


class FilteredControls(Controls):
    stage = Stage.FILTERED


class CheckControls(Controls, LazyCheck):
    """No token is asked about twice at the same place."""

    stage = Stage.CHECK

    def __init__(self, opened: Seq[OpenControl]) -> None:
        super().__init__(opened)
        self._upto, self._known = -1, dict[tuple[int, ...], bool]()

    def apply(self, row: Row) -> None:
        pass

    def allows(self, seq: Sequence, drafted: Seq[int], token: int) -> bool:
        if self._upto != len(seq.tokens):
            self._upto, self._known = len(seq.tokens), {}
        path = (*drafted, token)
        if path not in self._known:
            with failing(seq):
                self._known[path] = all(one.accepts(seq, list(drafted), token) for one in self.running(seq))
        return self._known[path]
