"""What backends with NumPy's arrays and backends with PyTorch's tensors share: one form of small computations for both.

Arrays and tensors keep their library. Importing this module does not import PyTorch. dtypes of NumPy and PyTorch have the same names;
bfloat16 of NumPy is that of ml_dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import array_api_compat
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16), "bfloat16": BFLOAT16, "float32": np.dtype(np.float32), "float64": np.dtype(np.float64)
}  # fmt: skip

Numbers = NDArray[Any]
Tensor = Any
"""Numbers of the backend in use: an array of NumPy or a tensor of PyTorch."""


def namespace(x: Any) -> Any:
    """The functions of the library of `x` under the names of the array API standard."""
    return array_api_compat.array_namespace(x)


def array(x: Any) -> NDArray[Any]:
    """An array or tensor as an array, not copied unless it lies on a GPU. bfloat16 stays bfloat16."""
    if isinstance(x, np.ndarray):
        return x
    import torch

    dtype, tensor = numpy_dtype(x.dtype), x.detach().cpu()
    if dtype.isbuiltin == 1:
        return np.asarray(tensor.numpy())
    return np.asarray(tensor.view({1: torch.uint8, 2: torch.int16}[dtype.itemsize]).numpy().view(dtype))


def name_of(dtype: Any) -> str:
    """Of a dtype of NumPy or PyTorch."""
    return str(dtype).removeprefix("torch.")


def numpy_dtype(dtype: Any) -> np.dtype[Any]:
    """NumPy's dtype with the name of a dtype of NumPy or PyTorch."""
    return np.dtype(dtype if isinstance(dtype, np.dtype | type) else name_of(dtype))


def same_library(dtype: Any, name: str) -> Any:
    """The dtype `name` of the library of `dtype`."""
    if isinstance(dtype, np.dtype):
        return np.dtype(name)
    import torch

    return getattr(torch, name)


def wide(dtype: Any) -> Any:
    """float32 or better: the dtype in which numbers of this dtype are computed."""
    return same_library(dtype, "float32") if dtype.itemsize < 4 else dtype


def cast(x: Any, dtype: Any) -> Any:
    """x in this dtype of its library."""
    return x.astype(dtype, copy=False) if isinstance(x, np.ndarray) else x.to(dtype)


def widened(x: Any) -> Any:
    """x in float32 or better."""
    return cast(x, wide(x.dtype))


def dots(a: Any, b: Any) -> Any:
    """a [..., R, D] times b [..., n, D] -> [..., R, n]. With NumPy an element depends on its two vectors only: einsum adds the products
    of one element after the other, while a matrix product's order depends on the number of rows."""
    return np.einsum("...rd,...nd->...rn", a, b) if isinstance(a, np.ndarray) else a @ b.mT


def mixed(weights: Any, values: Any) -> Any:
    """weights [..., R, n] times values [..., n, D] -> [..., R, D]. With NumPy the terms of an element are added in order, so weights of
    0 change nothing wherever they are."""
    return np.einsum("...rn,...nd->...rd", weights, values) if isinstance(weights, np.ndarray) else weights @ values


def total(x: Any) -> Any:
    """The sums [..., 1] of x [..., n]. With NumPy the terms are added in order, so zeros change nothing wherever they are."""
    return np.cumsum(x, -1)[..., -1:] if isinstance(x, np.ndarray) else x.sum(-1, keepdim=True)


def times(x: Any, factor: float) -> Any:
    """x times a number, rounded once."""
    return cast(widened(x) * widened(x).dtype.type(factor), x.dtype) if isinstance(x, np.ndarray) else x * factor


def replaced(x: Any, rows: Any, values: Any) -> Any:
    """A copy of x with other values in these rows."""
    made = namespace(x).asarray(x, copy=True)
    made[rows] = values
    return made


def like(values: Any, x: Any) -> Any:
    """values, of NumPy or of the library of x, in that library, with the dtype and on the device of x."""
    if isinstance(x, np.ndarray):
        return array(values).astype(x.dtype, copy=False)
    given = widened(values) if isinstance(values, np.ndarray) else values  # PyTorch cannot read NumPy's bfloat16
    return namespace(x).asarray(given, dtype=x.dtype, device=device(x))


def turned(x: Any, frequencies: Sequence[float], by: Any) -> Any:
    """x [..., D] in float32 or better, rotated by `by` positions: integers that broadcast to the dimensions before D. The pairs
    (i, i + n) turn by these n frequencies, with angles in float64. Channels behind the pairs stay."""
    xp, half, wide_x = namespace(x), len(frequencies), widened(x)
    angles = cast(by, xp.float64)[..., None] * xp.asarray(frequencies, dtype=xp.float64, device=device(x))
    cos, sin = (cast(part, wide_x.dtype) for part in (xp.cos(angles), xp.sin(angles)))
    a, b = wide_x[..., :half], wide_x[..., half : 2 * half]
    return xp.concat([a * cos - b * sin, b * cos + a * sin, wide_x[..., 2 * half :]], axis=-1)


def kth_largest(x: Any, k: int) -> Any:
    """The k-th largest number of each vector of x [..., n]: [..., 1]. NaN is above all numbers."""
    return np.partition(x, -k)[..., -k, None] if isinstance(x, np.ndarray) else x.topk(k).values[..., -1:]


def largest(x: Any, k: int) -> tuple[Any, NDArray[Any]]:
    """The k largest numbers of each vector of x [..., n] and their places, in any order."""
    if isinstance(x, np.ndarray):
        at = np.argpartition(x, -k)[..., -k:]
        return np.take_along_axis(x, at, -1), at
    values, places = x.topk(k, sorted=False)
    return values, array(places)


def log_sum_exp(x: Any) -> list[float]:
    """Of each row of x [T, n], in float64."""
    rows = cast(x, namespace(x).float64)
    if not isinstance(rows, np.ndarray):
        return rows.logsumexp(-1).tolist()  # type: ignore[no-any-return]
    most = rows.max(-1, keepdims=True, initial=-np.inf)
    return (np.log(np.exp(rows - most).sum(-1)) + most[:, 0]).tolist()  # type: ignore[no-any-return]


def device(x: Any) -> Any:
    """Where x lies."""
    return array_api_compat.device(x)
