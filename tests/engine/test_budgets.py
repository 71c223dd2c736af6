"""Budgets of cache policies become numbers of their options."""

from __future__ import annotations

from typing import Any

import pytest

from redraft import registry
from redraft.engine import budgets
from redraft.engine.budgets import Policy, budgeted
from redraft.errors import InvalidInput, UnknownMethod


@pytest.fixture(autouse=True)
def newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS["keep"], "newest", "tests.bench.test_cache:Newest")


def test_a_budget_fills_the_numbers_of_a_policy() -> None:
    policy = Policy.of("keep=newest:budget={tokens}+read=page-top-k:tokens={paged}+depth=layer-skip:speedup={speedup}")
    assert policy.name == "newest + page-top-k + layer-skip" and policy.places == {"tokens", "paged", "speedup"}
    assert policy.at(25, 1001) == {"keep": "newest:budget=251", "read": "page-top-k:tokens=256", "depth": "layer-skip:speedup=4"}
    assert Policy.of("keep=newest:budget={recent}").at(100, 300) == {"keep": "newest:budget=296"}
    assert Policy.of("keep=newest:budget={recent}").at(1, 300) == {"keep": "newest:budget=1"}
    assert Policy.of("keep=newest:budget={part}").at(12.5, 300) == {"keep": "newest:budget=0.125"}
    assert not Policy.of("keep=newest").places and budgeted(50, 3) == 2


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("newest", "must be seam=name:option=value"),
        ("verify=coupled", "seams: keep, codec, read, depth"),
        ("", "must name one method or more"),
        ("keep=newest+keep=newest", "each of another seam"),
        ("keep=newest:budget={token}", "no number {token}: did you mean 'tokens'"),
        ("keep=newest:budget={tokens", "braces do not match"),
    ],
)
def test_what_is_no_policy_is_one_line(text: str, reported: str) -> None:
    with pytest.raises(InvalidInput, match=reported) as caught:
        Policy.of(text)
    assert "\n" not in str(caught.value)


def test_unknown_methods_are_named() -> None:
    with pytest.raises(UnknownMethod, match="did you mean 'newest'"):
        Policy.of("keep=newes:budget=3")


def test_registered_methods_are_policies_that_their_cards_give_a_budget() -> None:
    found = {policy.name.partition(" + ")[0]: policy for policy in budgets.registered()}
    assert {*found} == {name for seam in budgets.CACHE for name in registry.METHODS[seam]}
    assert not found["newest"].places, "its card names no option that takes a budget"
    for policy in found.values():
        for seam, method in policy.at(50, 4096).items():
            registry.create(seam, method)


def test_a_card_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench.test_cache import Newest

    given: Any = {"budget": "budget={tokens}"}
    monkeypatch.setattr(Newest, "card", type(Newest.card)("Newest", "nobody", Newest.card.guarantee, **given))
    (policy,) = (one for one in budgets.registered() if one.name == "newest")
    assert policy.text == "keep=newest:budget={tokens}"


def test_a_card_names_what_a_method_needs_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench.test_cache import Newest

    for beside, wanted in (("codec=int8", ["keep=newest+codec=int8"]), ("codec=gone", [])):
        given: Any = {"beside": beside}
        monkeypatch.setattr(Newest, "card", type(Newest.card)("Newest", "nobody", Newest.card.guarantee, **given))
        assert [one.text for one in budgets.registered() if "newest" in one.name] == wanted
