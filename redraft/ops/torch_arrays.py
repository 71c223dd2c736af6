"""Numpy arrays as tensors of PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redraft.ops.arrays import BFLOAT16, Numbers, name_of
from redraft.ops.backend import Linear, LinearWeights
from redraft.ops.quantized import Quantized


def dtype_of(dtype: Any) -> torch.dtype:
    """PyTorch's type of the same name."""
    found: torch.dtype = getattr(torch, name_of(dtype))
    return found


def as_tensor(array: Numbers | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """On the CPU it shares the memory of the array, unless that may not be written to."""
    if isinstance(array, Tensor):
        return array.to(device)
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = array.copy()
    bits = array.view(np.int16) if array.dtype == BFLOAT16 else array
    found = torch.from_numpy(bits)
    return (found.view(torch.bfloat16) if bits is not array else found).to(device)


def as_tensors(weights: LinearWeights, device: torch.device | str = "cpu") -> LinearWeights:
    """A linear layer of numpy arrays, or of tensors already."""
    if isinstance(weights, Linear):
        return Linear(as_tensor(weights.weight, device), None if weights.bias is None else as_tensor(weights.bias, device))
    if isinstance(weights, Quantized):
        placed: dict[str, Any] = {name: as_tensor(array, device) for name, array in weights.arrays.items()}
        return replace(weights, dtype=dtype_of(weights.dtype), **placed)
    return weights
