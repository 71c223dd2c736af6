"""Prompts that clients send as vectors: base64 of a file of NumPy (npy) or of safetensors. A file of torch.save may hold code, so it is
refused."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redraft.errors import InvalidInput
from redraft.inputs import STAND_IN, vectors_of
from redraft.serve.errors import Refused
from redraft.serve.prompts import Prompt

FIELD = "prompt_embeds"
HEADER = 4096  # bytes of a header, at most


def prompts(given: str | list[str], hidden: int, limit: int) -> list[Prompt]:
    """One prompt for each text, `limit` at most. Refused (400) says what is wrong."""
    many = [given] if isinstance(given, str) else given
    if not many:
        raise Refused(400, "no prompt was given", FIELD)
    if len(many) > limit:
        raise Refused(400, f"{FIELD} has {len(many)} prompts: at most {limit} are allowed", FIELD)
    found = []
    for text in many:
        try:
            tokens, vectors = vectors_of(_array(text))
        except InvalidInput as error:
            raise Refused(400, str(error), FIELD) from None
        if vectors.shape[1] != hidden:
            raise Refused(400, f"{FIELD} has vectors of {vectors.shape[1]} numbers: this model has {hidden}", FIELD)
        found.append(Prompt([STAND_IN] * len(tokens), "", FIELD, vectors=vectors))
    return found


def _array(text: str) -> NDArray[Any]:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, f"{FIELD}: base64 of an npy or a safetensors file is needed", FIELD) from None
    if data.startswith(b"\x93NUMPY"):
        return _npy(data)
    if data.startswith((b"PK", b"\x80")):
        raise Refused(400, f"{FIELD}: a file of torch.save or pickle may hold code; npy and safetensors are allowed", FIELD)
    return _safetensors(data)


def _npy(data: bytes) -> NDArray[Any]:
    """The array, if the header states the size that the data have. Nothing is allocated before."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, by_columns, dtype = read(file, max_header_size=HEADER)
        if dtype.kind != "f":
            raise Refused(400, f"{FIELD}: numbers of type {dtype.name[:20]}; float16, float32 and float64 are allowed", FIELD)
        flat = np.frombuffer(data, dtype, offset=file.tell())
        return flat.reshape(shape, order="F" if by_columns else "C")
    except (ValueError, KeyError, TypeError, OverflowError, SyntaxError, RecursionError, MemoryError):
        raise Refused(400, f"{FIELD}: not a complete npy file", FIELD) from None


def _safetensors(data: bytes) -> NDArray[Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        raise Refused(400, f"{FIELD}: neither an npy nor a complete safetensors file", FIELD) from None
    if len(tensors) != 1:
        raise Refused(400, f"{FIELD}: a safetensors file of {len(tensors)} tensors; one is needed", FIELD)
    return next(iter(tensors.values()))
