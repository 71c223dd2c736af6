"""Weights of few bits: nats that running text loses. Outliers are planted in the model of the package, so that they can be seen."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy

import redraft.embedded
from redraft import LLM
from redraft.bench import cache
from redraft.bench.tasks import Wanted, build, sources
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import F64, Lab

TARGET = Path(next(iter(redraft.embedded.__path__))) / "target"
LENGTH = 384
AFTER = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
         "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}  # fmt: skip


def logprobs(llm: LLM, lab: Lab, usual: int = 8) -> F64:
    """The mean log-probability of each text."""
    found = sources([])
    task = build(llm.tokenizer, found, Wanted(length=LENGTH, count=lab.count(usual), given=64, seed=lab.seed), LENGTH)[0]
    return np.asarray(cache.score(llm, task, task.probes, cache.FULL, 4, lambda what: None).logprobs.mean(1))


def loss(quant: str):  # type: ignore[no-untyped-def]
    def run(lab: Lab) -> Found:
        plain, small = lab.llm, lab.load(quant=quant)
        share = small.runner.weights.bytes / plain.runner.weights.bytes
        return Found(logprobs(small, lab) - logprobs(plain, lab), [f"{share:.0%} of the bytes of bfloat16"])

    return run


def planted(lab: Lab, name: str, change) -> str:  # type: ignore[no-untyped-def]
    """A folder with a copy of the package's model whose arrays `change` has changed."""
    folder = lab.folder / name
    if not folder.exists():
        shutil.copytree(TARGET, folder)
        file = folder / "model.safetensors"
        arrays = {key: value.copy() for key, value in safetensors.numpy.load_file(file).items()}
        change(arrays, np.random.default_rng(lab.seed))
        safetensors.numpy.save_file(arrays, file, {"format": "pt"})
    return str(folder)


def loud_channels(arrays: dict[str, np.ndarray], dice: np.random.Generator) -> None:
    """3 gains of each norm become 30 times as large, and the weights that read them 30 times as small. The function stays."""
    for layer in range(sum("input_layernorm.weight" in name for name in arrays)):
        for norm, readers in AFTER.items():
            gain = arrays[f"model.layers.{layer}.{norm}.weight"]
            channels = dice.choice(len(gain), 3, replace=False)
            gain[channels] *= 30
            for reader in readers:
                arrays[f"model.layers.{layer}.{reader}.weight"][:, channels] /= 30


def loud_weights(arrays: dict[str, np.ndarray], dice: np.random.Generator) -> None:
    """1 of 500 weights of two matrices becomes 12 times as large."""
    for name in ("model.layers.1.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight"):
        some = dice.random(arrays[name].shape) < 1 / 500
        arrays[name][some] *= 12


def outliers(lab: Lab, first: str, second: str) -> Found:
    folder = planted(lab, "channels", loud_channels)
    exact, a, b = (logprobs(lab.load(folder, dtype="float32", **one), lab) for one in ({}, {"quant": first}, {"quant": second}))
    return Found(a - b, [f"change against float32: {first} {np.mean(a - exact):+.4f}, {second} {np.mean(b - exact):+.4f} nats"])


def outlier_columns(lab: Lab) -> Found:
    return outliers(lab, "int8:outliers=4", "int8")


def outlier_loss(lab: Lab) -> Found:
    folder = planted(lab, "channels", loud_channels)
    exact, small = (logprobs(lab.load(folder, dtype="float32", **one), lab) for one in ({}, {"quant": "int8:outliers=4"}))
    return Found(small - exact)


def adaptive(lab: Lab) -> Found:
    """With a large alpha no group is split, so that each output has one scale."""
    folder = planted(lab, "weights", loud_weights)
    ways = {"adaptive": "int4:group=adaptive", "one scale an output": "int4:group=adaptive,alpha=1000", "64": "int4:group=64"}
    exact = logprobs(lab.load(folder, dtype="float32"), lab)
    loaded = {name: lab.load(folder, dtype="float32", quant=quant) for name, quant in ways.items()}
    found = {name: logprobs(llm, lab) for name, llm in loaded.items()}
    notes = [
        f"{name}: {np.mean(one - exact):+.4f} nats, {loaded[name].runner.weights.bytes / 2**20:.2f} MiB" for name, one in found.items()
    ]
    return Found(found["adaptive"] - found["one scale an output"], notes)


CLAIMS = (
    Claim("weights-int8-loss", ("quant=int8",), "8 bits for weights and activations lose nothing that is measured (here: 0.01 nats)",
          "running text of 384 tokens, 8 exact columns, against bfloat16", "nats a token, change", loss("int8:outliers=8"), border=-0.01),
    Claim("weights-int8-outliers", ("quant=int8",), "Exact columns for outlier channels keep what plain 8 bits lose",
          "model of the package, 3 gains of each norm 30 times as large; 4 exact columns and none", "nats a token, with minus without",
          outlier_columns),
    Claim("weights-int8-planted", ("quant=int8",), "With the exact columns the loss stays within 1 % (here: 0.01 nats)",
          "the same, against float32", "nats a token, change", outlier_loss, border=-0.01),
    Claim("weights-int4-loss", ("quant=int4",), "4 bits for weights alone lose little (here: 0.1 nats)",
          "running text, groups of 64, against bfloat16", "nats a token, change", loss("int4"), border=-0.1),
    Claim("weights-int4-adaptive", ("quant=int4",), "Groups that adapt to the weights keep what one scale an output loses",
          "model of the package, 1 of 500 weights of two matrices 12 times as large", "nats a token, adaptive minus one scale", adaptive),
)  # fmt: skip
