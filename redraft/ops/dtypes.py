"""Names of number types. Arrays of bfloat16 are numpy arrays with the type of the package ml_dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16), "bfloat16": BFLOAT16, "float32": np.dtype(np.float32), "float64": np.dtype(np.float64)
}  # fmt: skip

Numbers = NDArray[Any]


def name_of(dtype: Any) -> str:
    """Of numpy's types and of PyTorch's."""
    return str(dtype).removeprefix("torch.")


def at_least_float32(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """float64 as it is, others as float32."""
    return dtype if dtype == np.float64 else np.dtype(np.float32)
