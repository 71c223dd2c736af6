"""The guarantee of a configuration: the weakest guarantee of its methods."""

from __future__ import annotations

from typing import Any, cast

from redraft import registry
from redraft.card import Card, Guarantee


def weakest(**methods: str | None) -> Guarantee:
    """The weakest guarantee among methods given as seam="name:option=value,...". None means no method.

    >>> weakest(draft="none", verify="rejection", keep=None).label
    'same-distribution'
    """
    chosen = [(seam, registry.parse(text)[0]) for seam, text in methods.items() if text is not None]
    cards: list[Card] = [cast(Any, registry.method(seam, name)).card for seam, name in chosen]
    return max((card.guarantee for card in cards), default=Guarantee.SAME_TEXT)
