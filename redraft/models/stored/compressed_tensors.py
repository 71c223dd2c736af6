"""compressed-tensors, the format of LLM Compressor: 4-bit codes with a scale for each group, 8-bit codes and 8-bit floating point with a
scale for each output. https://github.com/vllm-project/compressed-tensors. Activations are not quantized as the file asks for, but as for
all codes here."""

from __future__ import annotations

from typing import Any

import numpy as np

from redraft.errors import CheckpointError, Unsupported, shown
from redraft.models.stored.source import Matrix, Stored, four_bits
from redraft.ops.arrays import DTYPES, Numbers
from redraft.ops.quantized import LARGEST_CODE, Quantized

_FORMATS = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"


class CompressedTensors(Stored):
    """4 bits: `weight_packed` [outs, ins / 8], `weight_scale` [outs, groups], `weight_zero_point` [outs / 8, groups] if asymmetric,
    `weight_shape`. 8 bits: `weight` [outs, ins] in int8 or float8 (E4M3), `weight_scale` [outs, 1] or one number."""

    parts = "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"

    def setup(self) -> None:
        self.field("format", None, *_FORMATS)
        groups = self.fields.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError(f"{self.where}: quantization_config.config_groups = {shown(groups)}: an object is needed")
        ways = [one.get("weights") if isinstance(one, dict) else None for one in groups.values()]
        if any(way != ways[0] for way in ways) or not isinstance(ways[0], dict):
            raise Unsupported(f"{self.where}: quantization_config.config_groups: weights quantized in several ways")
        self.way: dict[str, Any] = ways[0]
        bits, kind, strategy = self.way.get("num_bits"), self.way.get("type", "int"), self.way.get("strategy")
        known = (4, "int", "group"), (4, "int", "channel"), (8, "int", "channel"), (8, "float", "channel"), (8, "float", "tensor")
        if (bits, kind, strategy) not in known:
            raise Unsupported(f"{self.where}: quantization_config: weights of {bits} bits, type {kind}, strategy {strategy} are not read")
        size = self.way.get("group_size") if strategy == "group" else -1
        if type(size) is not int or size == 0 or size < -1:
            raise CheckpointError(f"{self.where}: quantization_config: group_size = {shown(size)}: must be a positive integer")
        self.bits, self.size = bits, size

    def matrix(self, name: str) -> Matrix | None:
        module, _, part = name.rpartition(".")
        info = self.raw.tensors[name]
        if part == "weight_packed" and self.bits == 4:
            outs, words = self.shape(name)
            return Matrix(module, outs, 8 * words)
        if part == "weight" and len(info.shape) == 2 and info.dtype in ("I8", "F8_E4M3"):
            return Matrix(module, *info.shape)
        return None

    def weight(self, found: Matrix) -> Quantized | Numbers:
        if self.bits == 4:
            size, groups = self.groups(found, self.size)
            if self.has(found, "weight_g_idx"):
                raise Unsupported(f"{self.index}: {found.module}.weight_g_idx: columns in the order of their importance are not read")
            codes = self.words(found, "weight_packed").reshape(found.outs, found.ins)
            zero = np.full((found.outs, groups), 8, np.int8)
            if self.has(found, "weight_zero_point"):
                words = self.words(found, "weight_zero_point", (-(-found.outs // 8), groups))
                zero = words.swapaxes(1, 2).reshape(-1, groups)[: found.outs]
            return four_bits(codes, self.tensor(found, "weight_scale", (found.outs, groups)), zero, size)
        scale = self.tensor(found, "weight_scale").astype(np.float32)
        if scale.size not in (1, found.outs):
            raise CheckpointError(f"{self.index}: {found.module}.weight_scale has shape {list(scale.shape)}, expected [{found.outs}, 1]")
        codes, scale = self.tensor(found, "weight", None, ("I8", "F8_E4M3")), np.broadcast_to(scale.reshape(-1, 1), (found.outs, 1))
        if codes.dtype != np.int8:
            decoded: Numbers = codes.astype(np.float32) * scale
            return decoded
        if self.has(found, "weight_zero_point") or int(codes.min()) < -LARGEST_CODE:
            shift: Numbers | float = 0.0
            if self.has(found, "weight_zero_point"):
                shift = self.tensor(found, "weight_zero_point", None, ("I8", "I32")).astype(np.float32).reshape(-1, 1)
            shifted: Numbers = (codes.astype(np.float32) - shift) * scale
            return shifted
        return Quantized(codes, np.ascontiguousarray(scale[:, 0]), found.ins, DTYPES["float32"])
