"""Files of trained parts for the tiny model, with random numbers, so that methods that need one run in the contracts."""

from __future__ import annotations

import atexit
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from redraft.models.runner import Runner
from redraft.models.trained import Trained, model_hash
from tests.contracts.identity import engine


@cache
def folder() -> Path:
    made = tempfile.TemporaryDirectory()
    atexit.register(made.cleanup)
    return Path(made.name)


@cache
def knob(layers: int) -> Path:
    """Of context-knob, for the tiny model of so many layers."""
    return _knob(engine(layers=layers).runner, f"knob-{layers}")


@cache
def channels(layers: int, method: str = "think") -> Path:
    """Of think or mikv, for the tiny model of so many layers."""
    return _channels(engine(layers=layers).runner, f"{method}-{layers}", method)


@cache
def heads(layers: int) -> Path:
    """Of razor and duo, for the tiny model of so many layers."""
    return _heads(engine(layers=layers).runner, f"heads-{layers}")


@cache
def votes(layers: int) -> Path:
    """Of compresskv, for the tiny model of so many layers."""
    return _votes(engine(layers=layers).runner, f"votes-{layers}")


@cache
def codebooks(layers: int) -> Path:
    """Of a2ats, for the tiny model of so many layers."""
    return _codebooks(engine(layers=layers).runner, f"codebooks-{layers}")


def fitted(policy: dict[str, str], runner: Runner) -> dict[str, str]:
    """The same choices with files for this model."""
    name = model_hash(runner)
    own = {
        str(knob(4)): lambda: _knob(runner, f"knob-{name}"),
        str(channels(4)): lambda: _channels(runner, f"think-{name}", "think"),
        str(channels(4, "mikv")): lambda: _channels(runner, f"mikv-{name}", "mikv"),
        str(heads(4)): lambda: _heads(runner, f"heads-{name}"),
        str(votes(4)): lambda: _votes(runner, f"votes-{name}"),
        str(codebooks(4)): lambda: _codebooks(runner, f"codebooks-{name}"),
    }
    for path, made in own.items():
        policy = {seam: text.replace(path, str(made())) if path in text else text for seam, text in policy.items()}
    return policy


def _knob(runner: Runner, name: str) -> Path:
    """At the output of the first layer."""
    u = np.random.default_rng(7).standard_normal(runner.spec.hidden)
    about = {"layer": 0, "context": 6.0, "prior": -6.0}
    return Trained("context-knob", model_hash(runner), about, {"u": u.astype(np.float32)}).save(folder() / f"{name}.safetensors")


def _channels(runner: Runner, name: str, method: str) -> Path:
    spec = runner.spec
    scores = np.random.default_rng(8).random((len(spec.layers), spec.kv_heads, spec.head_dim), np.float32)
    about = {"texts": 1, "tokens": 1}
    return Trained(method, model_hash(runner), about, {"scores": scores}).save(folder() / f"{name}.safetensors")


def _heads(runner: Runner, name: str) -> Path:
    """The last head scores best."""
    shape = len(runner.spec.attention), runner.spec.kv_heads
    scores = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape) / (shape[0] * shape[1])
    return Trained("razor", model_hash(runner), {"tokens": 1}, {"echo": scores, "induction": scores}).save(folder() / f"{name}.safetensors")


def _votes(runner: Runner, name: str) -> Path:
    """The last head scores best, and later layers are hurt more."""
    layers = len(runner.spec.attention)
    scores = np.tile(np.arange(runner.spec.attention[0].heads, dtype=np.float32), (layers, 1))
    arrays = {"heads": scores, "damage": np.arange(1, layers + 1, dtype=np.float32)}
    return Trained("compresskv", model_hash(runner), {"tokens": 1, "texts": 1}, arrays).save(folder() / f"{name}.safetensors")


def _codebooks(runner: Runner, name: str) -> Path:
    """Sixteen vectors, all directions alike, for a distance of 40."""
    spec, chance = runner.spec, np.random.default_rng(9)
    shape = len(spec.attention), spec.kv_heads
    factors = np.broadcast_to(np.eye(spec.head_dim, dtype=np.float32), (*shape, spec.head_dim, spec.head_dim))
    arrays = {"factors": factors, "vectors": chance.standard_normal((*shape, 16, spec.head_dim)).astype(np.float32)}
    about = {"texts": 1, "tokens": 1, "distance": 40}
    return Trained("a2ats", model_hash(runner), about, arrays).save(folder() / f"{name}.safetensors")
