"""Heads that draft from a model's states: one file each. `HEADS` names them, as on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redraft import registry

if TYPE_CHECKING:
    import numpy as np

    from redraft_train.heads.head import Head
    from redraft_train.target import Target

HEADS: dict[str, str] = {
    "draft": "redraft_train.heads.draft:Draft",
    "eagle": "redraft_train.heads.eagle:Eagle",
    "hydra": "redraft_train.heads.hydra:Hydra",
    "kangaroo": "redraft_train.heads.kangaroo:Kangaroo",
    "medusa": "redraft_train.heads.medusa:Medusa",
    "ppd": "redraft_train.heads.ppd:PPD",
}


def options(text: str) -> Any:
    """The options of a head from "name:option=value,...". UnknownMethod for an unknown name or option, InvalidInput for a bad value."""
    name, _ = registry.parse(text)
    if name not in HEADS:
        raise registry.unknown("head", name, HEADS)
    return registry.build(registry.load(HEADS[name]), text)


def create(text: str, target: Target, kept: np.ndarray) -> Head:
    """An untrained head; see `options`. kept: the tokens that it can draft, ascending. Random numbers are those of torch."""
    head: Head = options(text).head(target, kept)
    return head
