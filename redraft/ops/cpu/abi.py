"""The structures of kernels.h and layers.h and the functions of api.cpp, for ctypes and numpy."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

F32, BF16, I8, I4, G8, I2, THIN = range(7)
ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "sigmoid": 5, "quick_gelu": 6}
PANEL, LINE = 64, 64

POINTER, SIZE, NUMBER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def address(x: Any) -> int:
    """Of the numbers of an array of numpy; several times faster than x.ctypes."""
    at: int = x.__array_interface__["data"][0]
    return at


class Rows(ctypes.Structure):
    _fields_ = [("data", POINTER), ("rows", SIZE), ("cols", SIZE), ("stride", SIZE), ("kind", NUMBER)]

    @classmethod
    def of(cls, x: Any, kind: int) -> Rows:
        """x [T, cols], an array of numpy; its last dimension must be contiguous."""
        rows, cols = x.shape
        return cls(address(x), rows, cols, x.strides[0] if rows > 1 else cols * x.itemsize, kind)


class Linear(ctypes.Structure):
    _fields_ = [
        ("panels", POINTER), ("bias", POINTER), ("scale", POINTER), ("sums", POINTER),
        ("scales", POINTER), ("lows", POINTER), ("factors", POINTER), ("offsets", POINTER), ("columns", POINTER), ("side", POINTER),
        ("outs", SIZE), ("ins", SIZE), ("kind", NUMBER), ("group", NUMBER), ("gated", NUMBER), ("outliers", NUMBER), ("per", NUMBER),
    ]  # fmt: skip


SIZES = tuple(field[0] for field in Linear._fields_ if field[1] is not POINTER)  # the fields that are numbers


class LowRank(ctypes.Structure):
    _fields_ = [("a", POINTER), ("b", POINTER), ("ins", SIZE), ("outs", SIZE), ("first", SIZE), ("rank", NUMBER), ("kind", NUMBER)]


class Adapter(ctypes.Structure):
    _fields_ = [("terms", ctypes.POINTER(LowRank)), ("starts", POINTER)]


class Adapters(ctypes.Structure):
    _fields_ = [("of_row", POINTER), ("every", ctypes.POINTER(Adapter))]


class Pool(ctypes.Structure):
    _fields_ = [
        ("data", POINTER), ("block_bytes", SIZE), ("unit_bytes", SIZE), ("per_block", SIZE), ("values", SIZE),
        ("layers", NUMBER), ("kv_heads", NUMBER), ("size", NUMBER), ("kind", NUMBER),
        ("key_scales", SIZE), ("value_scales", SIZE), ("key_zeros", SIZE), ("value_zeros", SIZE),
        ("key_left", SIZE), ("key_right", SIZE), ("value_left", SIZE), ("value_right", SIZE),
        ("key_outliers", SIZE), ("key_places", SIZE), ("value_outliers", SIZE), ("value_places", SIZE),
        ("channels", SIZE), ("balance", SIZE),
        ("numbers", NUMBER), ("rank", NUMBER), ("outliers", NUMBER), ("kept", NUMBER),
    ]  # fmt: skip


class Heads(ctypes.Structure):
    _fields_ = [("count", NUMBER), ("window", NUMBER), ("rotary", NUMBER), ("scale", REAL), ("softcap", REAL), ("sink_logits", POINTER)]


class Experts(ctypes.Structure):
    _fields_ = [
        ("up", ctypes.POINTER(Linear)), ("down", ctypes.POINTER(Linear)), ("router", Linear), ("gate", Linear), ("count", NUMBER),
        ("top_k", NUMBER), ("renormalise", NUMBER), ("shared", NUMBER), ("activation", NUMBER), ("shared_activation", NUMBER),
        ("limit", REAL), ("shift", REAL),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = [
        ("qkv", Linear), ("out", Linear), ("up", Linear), ("down", Linear), ("experts", ctypes.POINTER(Experts)),
        ("attn_norm", POINTER), ("attn_norm_bias", POINTER), ("mlp_norm", POINTER), ("mlp_norm_bias", POINTER),
        ("attn_post", POINTER), ("mlp_post", POINTER), ("q_norm", POINTER), ("k_norm", POINTER), ("heads", Heads),
        ("eps", REAL), ("qk_eps", REAL), ("post_eps", REAL), ("residual", REAL), ("rms", NUMBER), ("qk_rms", NUMBER), ("post_rms", NUMBER),
        ("together", NUMBER), ("apart", NUMBER), ("parallel", NUMBER), ("gains", NUMBER), ("activation", NUMBER),
    ]  # fmt: skip


class Step(ctypes.Structure):
    _fields_ = [
        ("rows", SIZE), ("count", SIZE), ("seqs", ctypes.c_char_p), ("pool", Pool), ("encoded", Pool), ("turns", POINTER), ("far", POINTER),
        ("half", SIZE), ("watched", POINTER), ("watches", SIZE), ("plan", POINTER),
    ]  # fmt: skip


class Rotaries(ctypes.Structure):
    _fields_ = [("frequencies", POINTER), ("scales", POINTER), ("count", SIZE), ("half", SIZE)]


class Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(Layer)), ("count", SIZE), ("hidden", SIZE), ("rows", POINTER), ("norm", POINTER), ("norm_bias", POINTER),
        ("head", Linear), ("rotaries", Rotaries), ("pool", Pool), ("eps", REAL), ("embed_scale", REAL), ("rms", NUMBER), ("kind", NUMBER),
        ("gains", NUMBER),
    ]  # fmt: skip


# The beginning of a batch and of a sequence for run_step in layers.h.
BATCH = struct.Struct("6i")
PLAIN = struct.Struct("5i")

# In the order of kernels.h. Seq: twelve numbers and ten addresses; Watched: three addresses, a size, four numbers, a float and a
# number; Picked: an address and two numbers.
SEQ = struct.Struct("12i10P")
WATCHED = struct.Struct("3Pq4ifi")
PICKED = struct.Struct("P2i")

# In the order of rd_sizes in api.cpp.
STRUCTURES = Rows, Linear, LowRank, Adapters, Pool, Heads, Experts, Layer, Step, Rotaries, Model
SIZES_OF = " ".join(map(str, [*map(ctypes.sizeof, STRUCTURES), *(packed.size for packed in (SEQ, WATCHED, PICKED))]))

_ROWS, _LINEAR, _STEP = (ctypes.POINTER(kind) for kind in (Rows, Linear, Step))
SIGNATURES: dict[str, tuple[Any, ...]] = {  # the type of the result, then those of the arguments
    "rd_huge": (None, POINTER, SIZE),
    "rd_panel_bytes": (SIZE, _LINEAR),
    "rd_pack": (NUMBER, _LINEAR, POINTER, POINTER),
    "rd_rows": (None, _LINEAR, POINTER, SIZE, NUMBER, POINTER),
    "rd_pack_floats": (NUMBER, _LINEAR, POINTER, POINTER),
    "rd_pack_int8": (NUMBER, _LINEAR, POINTER, POINTER, POINTER),
    "rd_pack_groups": (NUMBER, _LINEAR, POINTER, POINTER),
    "rd_arrange": (NUMBER, _LINEAR, POINTER, SIZE, SIZE, POINTER),
    "rd_linear": (NUMBER, _LINEAR, _ROWS, _ROWS, NUMBER, NUMBER),
    "rd_head": (NUMBER, _ROWS, POINTER, POINTER, REAL, NUMBER, NUMBER, _LINEAR, POINTER, SIZE, NUMBER, POINTER, POINTER),
    "rd_norm": (NUMBER, _ROWS, _ROWS, POINTER, POINTER, REAL, NUMBER, NUMBER),
    "rd_route": (NUMBER, _ROWS, NUMBER, NUMBER, NUMBER, POINTER),
    "rd_experts": (NUMBER, ctypes.POINTER(Experts), _ROWS, _ROWS),
    "rd_cap": (NUMBER, _ROWS, _ROWS, REAL),
    "rd_low_rank": (NUMBER, _ROWS, _ROWS, ctypes.POINTER(LowRank), POINTER, SIZE),
    "rd_activate": (NUMBER, _ROWS, _ROWS, NUMBER, NUMBER),
    "rd_rope": (NUMBER, _ROWS, SIZE, SIZE, POINTER, POINTER),
    "rd_contenders": (SIZE, ctypes.c_uint64, POINTER, POINTER, SIZE, POINTER),
    "rd_turns": (NUMBER, ctypes.POINTER(Rotaries), POINTER, SIZE, POINTER),
    "rd_plan": (POINTER, _STEP, NUMBER),
    "rd_plan_free": (None, POINTER),
    "rd_attend": (NUMBER, _STEP, NUMBER, ctypes.POINTER(Heads), POINTER, _ROWS, _ROWS, _ROWS, _ROWS),
    "rd_products": (NUMBER, POINTER, POINTER, SIZE, SIZE, SIZE, SIZE, POINTER),
    "rd_run": (NUMBER, ctypes.POINTER(Layer), SIZE, SIZE, _STEP, SIZE, ctypes.POINTER(Adapters), _ROWS),
    "rd_pass": (NUMBER, ctypes.POINTER(Model), ctypes.c_char_p, ctypes.POINTER(Adapters), NUMBER, *[POINTER] * 4),
}


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the types of the functions."""
    for name, (returned, *taken) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = returned, taken
    return library
