"""All claims, and the methods that have none."""

from __future__ import annotations

import importlib
from pathlib import Path

from scripts.claims.claim import Claim

METHODS = Path(__file__).parent / "methods"
NO_CLAIM = {
    "draft=none": "plain decoding, the baseline of all drafters",
    "sched=fcfs": "the baseline of schedulers",
    "route=round-robin": "the baseline of routers",
    "quant=stored": "multiplies what a file stores; it has no paper",
}


def every() -> list[Claim]:
    """Those of all modules in methods/. ValueError if two have one name."""
    families = sorted(path.stem for path in METHODS.glob("[a-z]*.py"))
    found = [claim for family in families for claim in importlib.import_module(f"scripts.claims.methods.{family}").CLAIMS]
    names = [claim.name for claim in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"claims named twice: {', '.join(sorted(twice))}")
    return found


def chosen(names: list[str]) -> list[Claim]:
    """The claims that names mean, each once. ValueError names one that means none."""
    claims = every()
    if names == ["all"]:
        return claims
    for name in names:
        if not any(claim.answers(name) for claim in claims):
            why = next((reason for method, reason in NO_CLAIM.items() if name in (method, method.partition("=")[2])), None)
            raise ValueError(f"no claim of {name!r}" + (f": {why}" if why else "; scripts/prove claims without a name lists them"))
    return [claim for claim in claims if any(claim.answers(name) for name in names)]
