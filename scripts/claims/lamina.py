"""Lamina: more tokens a dollar than equal devices, the more the longer the context (1.48 to 12.1 times in its first version, 1.16 to 1.9
in a later one). A roofline of 2 H100 + 4 H20 against 4 H100, two batches alternate; nothing is drawn, so there is no interval."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from redraft.sim.lamina import Device, Model, homogeneous, offloaded

H100, H20 = Device(989e12, 3.35e12, 80e9, 11.06), Device(148e12, 4.0e12, 96e9, 4.63)
MODELS = {"LLaMA-65B": Model(65e9, 80, 8192), "LLaMA-3-70B": Model(70e9, 80, 8192, groups=8)}
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def run(seeds: int) -> Iterator[str]:
    for name, model in MODELS.items():
        gains = []
        for context in CONTEXTS:
            ours, theirs = offloaded(model, H100, 2, H20, 4, context), homogeneous(model, H100, 4, context)
            gains.append(ours.per_dollar / theirs.per_dollar)
            gaps = f"{1000 * ours.step:.0f} instead of {1000 * theirs.step:.0f} ms a token"
            yield f"  {name}, context {context}: {gains[-1]:.2f} times the tokens a dollar, {gaps}"
        rises = all(a <= b * 1.0001 for a, b in pairwise(gains))
        yield f"{name}: grows with the context: {'confirmed' if rises else 'refuted'}"
        yield f"{name}: below 1 for short contexts: {'confirmed' if gains[0] < 1 else 'refuted'}"
