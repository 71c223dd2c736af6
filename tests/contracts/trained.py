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


def fitted(policy: dict[str, str], runner: Runner) -> dict[str, str]:
    """The same choices with files for this model."""
    own = {str(knob(4)): lambda: str(_knob(runner, f"knob-{model_hash(runner)}"))}
    for path, made in own.items():
        policy = {seam: text.replace(path, made()) if path in text else text for seam, text in policy.items()}
    return policy


def _knob(runner: Runner, name: str) -> Path:
    """At the output of the first layer."""
    u = np.random.default_rng(7).standard_normal(runner.spec.hidden)
    about = {"layer": 0, "context": 6.0, "prior": -6.0}
    return Trained("context-knob", model_hash(runner), about, {"u": u.astype(np.float32)}).save(folder() / f"{name}.safetensors")
