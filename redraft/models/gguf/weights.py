"""The tensors of a GGUF file as a TensorSource."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from redraft.core.spec import WeightSource
from redraft.models.checkpoint import FLOAT32, TensorInfo
from redraft.models.gguf import file, names
from redraft.models.gguf.packed import packed_bytes, quantized
from redraft.models.mapped import Mapped
from redraft.ops.arrays import Numbers
from redraft.ops.quantized import Quantized


class Gguf:
    """The tensors of a file or split set, decoded when they are read. records: what is stored, by name."""

    def __init__(self, found: file.Contents) -> None:
        self.contents = found  # kept as long as weights are read, so that the tokenizer's reader finds it
        self.records, self.index = found.records, found.path
        self.dtypes = file.kinds()
        self.tensors = {
            name: TensorInfo(record.file, record.shape, record.kind.name)
            for name, record in found.records.items()
            if name != names.ROPE  # a part of the spec
        }

    @property
    def files(self) -> list[Path]:
        return sorted({record.file for record in self.records.values()})

    @property
    def mapped(self) -> tuple[Mapped, ...]:
        return self.contents.mapped

    def read(self, name: str, part: int | slice | None = None, dtype: np.dtype[Any] = FLOAT32) -> Numbers:
        record = self.records[name]
        if len(record.shape) == 1:
            whole = self._decoded(record, 0, 1, dtype)[0]
            some: Numbers = whole if part is None else whole[part]
            return some
        inner = len(record.data) // record.shape[0]  # rows of one entry of the first dimension
        if isinstance(part, int):
            return self._decoded(record, part * inner, (part + 1) * inner, dtype).reshape(record.shape[1:])
        begin, end, _ = (part or slice(None)).indices(record.shape[0])
        return self._decoded(record, begin * inner, end * inner, dtype).reshape(-1, *record.shape[1:])

    def packed(self, source: WeightSource, bias: Numbers | None) -> Quantized | None:
        found = quantized([self.records[name] for name in source.names], source, bias)
        self.contents.forget()
        return found

    def packed_bytes(self, source: WeightSource) -> int | None:
        return packed_bytes([self.records[name] for name in source.names], source)

    def _decoded(self, record: file.Record, begin: int, end: int, dtype: np.dtype[Any]) -> Numbers:
        out = np.empty((max(0, end - begin), record.shape[-1]), dtype)
        for rows, numbers in file.decode(record, begin, end):
            with np.errstate(all="ignore"):  # large numbers become infinite, NaN stays
                out[rows.start - begin : rows.stop - begin] = numbers
        self.contents.forget()
        return out
