"""Trained heads and small layers that draft from the target's states (--heads FOLDER has a folder of each), and drafts from early exits."""

from __future__ import annotations

from functools import partial

import numpy as np

from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab


def trained(lab: Lab, name: str) -> str:
    """The drafter with its file. SystemExit if it was not trained."""
    path = None if lab.heads is None else lab.heads / name
    if path is None or not path.exists():
        raise SystemExit(f"no {name} in --heads {lab.heads}; make it with: redraft train MODEL --head {name} --out FOLDER/{name}")
    return f"{name}:path={path}"


def pays(name: str, lab: Lab) -> Found:
    llm, draft = lab.llm, trained(lab, name) if name in HEADS else name
    given = lab.prompts(llm, 8)
    texts = lab.texts(llm, draft, given)
    drafted, steps = sum(one.drafted for one in texts), sum(one.steps for one in texts)
    notes = [f"tokens a step {np.mean([one.rate for one in texts]):.2f}, {drafted / steps:.1f} drafted"]
    return Found(lab.speedup(llm, draft, given), notes)


def longer(one: str, other: str, lab: Lab) -> Found:
    given = lab.prompts(lab.llm, 12)
    a, b = (lab.rates(lab.llm, trained(lab, name), given) for name in (one, other))
    return Found(a - b, [f"tokens a step {a.mean():.2f}, {other} {b.mean():.2f}"])


HEADS = ("eagle", "hydra", "kangaroo", "medusa", "ppd")
TIME = "processor time, plain / drafted"
CLAIMS = (
    Claim("medusa-pays", ("draft=medusa",), "Independent heads on one state make decoding 2.2 times as fast (here: faster)",
          "a head trained on a frozen model, 8 prompts x 40 tokens, in turns", TIME, partial(pays, "medusa"), border=1.0),
    Claim("hydra-sequential", ("draft=hydra",), "Heads that read the drafted tokens before them accept more than independent ones",
          "heads trained on the same texts, 12 prompts", "tokens a step, hydra minus medusa", partial(longer, "hydra", "medusa")),
    Claim("ppd-far", ("draft=ppd",), "Vectors that the target reads accept more of far tokens than independent heads",
          "trained on the same texts, 12 prompts", "tokens a step, ppd minus medusa", partial(longer, "ppd", "medusa")),
    Claim("eagle-states", ("draft=eagle",), "A layer over all states accepts more than heads on one state",
          "the same", "tokens a step, eagle minus medusa", partial(longer, "eagle", "medusa")),
    Claim("eagle-pays", ("draft=eagle",), "2.7 to 3.5 times as fast as plain decoding (here: faster)",
          "the same, 8 prompts x 40 tokens, in turns", TIME, partial(pays, "eagle"), border=1.0),
    Claim("kangaroo-pays", ("draft=kangaroo",), "An adapter on an early layer drafts 1.7 times as fast decoding (here: faster)",
          "the same", TIME, partial(pays, "kangaroo"), border=1.0),
    Claim("s2d-pays", ("draft=s2d",), "Drafts from a shallow exit, deeper where it is unsure, are 1.5 times as fast (here: faster)",
          "a model that was not trained for exits, 8 prompts x 40 tokens, in turns", TIME, partial(pays, "s2d"), border=1.0),
)  # fmt: skip
